"""Quantized checkpoints: stages of sub-layers leave weights as they are, all else is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import truedepth as td
from truedepth.inspection import inspect_model

STAGES = td.Plan.staggered(6, 1, 4)
PAIRS = td.Plan(6, [[2, 3]])


def int8(weight):
    return {
        "weight": weight.mul(9).round().to(torch.int8),
        "weight_scale": torch.ones(len(weight), 1),
    }


def fp8(weight):
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}


def packed(weight):
    rows, columns = weight.shape
    return {
        "qweight": torch.arange(columns // 8 * rows, dtype=torch.int32).reshape(-1, rows),
        "qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        "scales": torch.ones(1, rows, dtype=torch.float16),
        "g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def nf4(weight):
    return {
        "weight": torch.arange(weight.numel() // 2).to(torch.uint8)[:, None],
        "weight.absmax": torch.ones(weight.numel() // 64),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    }


METHODS = {
    "compressed-tensors": int8,
    "fp8": fp8,
    "gptq": packed,
    "awq": packed,
    "bitsandbytes": nf4,
}


@pytest.fixture(params=METHODS)
def quantized(request, make_model, tmp_path):
    """A checkpoint with names and dtypes as that method writes them; its values mean nothing."""
    source = shutil.copytree(make_model(), tmp_path / "source")
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.rpartition(".")[0]
        if name.endswith("_proj.weight"):
            made = METHODS[request.param](tensor)
            tensors |= {f"{module}.{key}": value.contiguous() for key, value in made.items()}
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": request.param}, "dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_stages_copy_every_byte(quantized, tmp_path):
    td.convert(quantized, tmp_path / "out", STAGES)
    before, after = (
        load_file(each / "model.safetensors") for each in (quantized, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    own, made = (
        json.loads((each / "config.json").read_text()) for each in (quantized, tmp_path / "out")
    )
    assert made["quantization_config"] == own["quantization_config"]
    assert made["dtype"] == "bfloat16"
    assert made["stages"] == [["F1", "A2"], ["F2", "A3"], ["F3", "A4"]]
    assert inspect_model(tmp_path / "out").plan == STAGES


def test_what_would_change_weights_is_refused(quantized, prose, tmp_path):
    out, method = tmp_path / "out", json.loads((quantized / "config.json").read_text())
    said = rf"quantized weights \({method['quantization_config']['quant_method']}\)"
    text = td.Calibration(text=[prose], tokens=4096)
    for refused, why in (
        (lambda: td.convert(quantized, out, PAIRS), "cannot be folded exactly"),
        (lambda: td.convert(quantized, out, STAGES, dtype=torch.float16), "folded exactly"),
        (lambda: td.convert(quantized, out, STAGES, pad_heads=4), "no heads can be added"),
        (lambda: td.calibrate(quantized, out, STAGES, text), "cannot be refitted"),
        (lambda: td.search(quantized, depth=5, calibration=text), "does not compute with"),
        (lambda: td.study(quantized, out, text=[prose]), "does not compute with"),
        (lambda: td.predict(quantized, STAGES), "does not compute with"),
    ):
        with pytest.raises(td.TruedepthError, match=f"{said}, .*{why}.*plan of stages"):
            refused()
    assert not out.exists()
