"""Quantized weights whose config.json does not say so."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import truedepth as td
from tiny_models import random_ids

PLAN = td.Plan(6, [[1, 2]])
MAP = "model.layers.3.mlp.up_proj.weight"


@pytest.fixture
def changed(make_model, tmp_path):
    """`changed({name: tensor})` is a copy of a model with other tensors, or more of them."""

    def change(tensors, **config):
        model = shutil.copytree(make_model(), tmp_path / "model")
        held = load_file(model / "model.safetensors")
        save_file(held | tensors, model / "model.safetensors", metadata={"format": "pt"})
        said = json.loads((model / "config.json").read_text()) | config
        (model / "config.json").write_text(json.dumps(said))
        return model

    return change


COMMANDS = {
    "convert": lambda model, out: td.convert(model, out, PLAN),
    "load": lambda model, out: td.load(model),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (MAP, torch.zeros(96, 64).to(torch.float8_e4m3fn)),
        (MAP, torch.zeros(96, 64).to(torch.float8_e5m2)),
        (MAP, torch.zeros(96, 64, dtype=torch.uint8).view(torch.float8_e8m0fnu)),
        (MAP, torch.zeros(96, 32, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)),
        ("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)),
        (MAP, torch.zeros(96, 64, dtype=torch.int8)),
        (MAP, torch.zeros(96, 32, dtype=torch.uint8)),
        (MAP, torch.zeros(96, 64, dtype=torch.bool)),
        (MAP.replace("weight", "qweight"), torch.zeros(8, 96, dtype=torch.int32)),
        (MAP.replace("weight", "weight_packed"), torch.zeros(96, 8, dtype=torch.int32)),
        (f"{MAP}_scale", torch.ones(96, 1)),
        (f"{MAP}_scale_inv", torch.ones(1, 1)),
        (MAP.replace("weight", "SCB"), torch.ones(96)),
        (f"{MAP}.absmax", torch.ones(96)),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)).removeprefix("torch."),
)
def test_quantized_weights_without_a_config_are_refused(changed, tmp_path, command, name, tensor):
    model = changed({name: tensor}, compression_config={"quant_method": "compressed-tensors"})
    with pytest.raises(td.TruedepthError) as caught:
        COMMANDS[command](model, tmp_path / "out")
    for word in (repr(name), str(tensor.dtype).removeprefix("torch."), "quantization_config"):
        assert word in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_complex_weights_are_refused(changed, tmp_path):
    model = changed({MAP: torch.zeros(96, 64, dtype=torch.complex64)})
    with pytest.raises(td.TruedepthError, match="complex64; weights must be real numbers"):
        td.convert(model, tmp_path / "out", PLAN)


def test_float64_is_converted_in_float64(changed, make_model, tmp_path):
    held = load_file(make_model() / "model.safetensors")
    td.convert(changed({name: t.double() for name, t in held.items()}), tmp_path / "out", PLAN)
    td.convert(make_model(), tmp_path / "single", PLAN)
    double = td.open_source(tmp_path / "out").tensors
    assert {tensor.dtype for tensor in double.values()} == {torch.float64}
    ids = random_ids()
    with torch.no_grad():
        logits = [
            td.load(tmp_path / out, dtype=torch.float64).model(ids).logits
            for out in ("out", "single")
        ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_masks_and_positions_are_no_weights(changed):
    masks = {
        "model.layers.0.self_attn.position_ids": torch.arange(9)[None],
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
    }
    td.load(changed(masks))


@pytest.mark.parametrize(("kind", "bits"), [("F6_E2M3", 6), ("I4", 4)])
def test_types_that_safetensors_cannot_read_are_named(changed, kind, bits):
    model, size = changed({}), 8 * bits
    header = json.dumps({MAP: {"dtype": kind, "shape": [8, 8], "data_offsets": [0, size]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(size)
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(td.TruedepthError, match=f"cannot be read.*{kind}") as caught:
        td.load(model)
    assert "corrupt" not in str(caught.value)
