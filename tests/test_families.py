"""Families beside Llama: the same files, other details."""

import json

import pytest
import torch
from transformers import MistralConfig, Qwen2Config
from typer.testing import CliRunner

import truedepth as td
from conftest import TINY, random_ids, reference_logits
from truedepth.cli import app
from truedepth.heal_options import TextPart
from truedepth.inspection import inspect_model

PLAN = td.Plan(6, [[2, 3], [4, 5]])
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
FAMILIES = (
    {"family": MistralConfig, "sliding_window": None},
    {"family": MistralConfig, "sliding_window": 8},
    {"family": MistralConfig, "sliding_window": None, "head_dim": 32},
    {"family": Qwen2Config},
    {
        "family": Qwen2Config,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 0,
    },
    {
        "family": Qwen2Config,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 6,
    },
)


def named(options):
    return " ".join(
        value.__name__ if name == "family" else f"{name}={value}" for name, value in options.items()
    )


@pytest.mark.parametrize("options", FAMILIES, ids=named)
@pytest.mark.parametrize("pad_heads", [1, 4])
def test_pairing_is_exact(make_model, options, pad_heads, tmp_path):
    source = make_model(**options)
    td.convert(source, tmp_path / "out", PLAN, pad_heads=pad_heads)
    window = options.get("sliding_window") if options.get("max_window_layers") != 6 else None
    original, converted = td.load(source).model, td.load(tmp_path / "out").model
    ids = random_ids()
    expected = reference_logits(original, ids, PLAN.groups, window)
    with torch.inference_mode():
        assert (converted(ids).logits - expected).abs().max() < 1e-4
        greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with_cache = converted.generate(ids, **greedy)
        assert torch.equal(with_cache, converted.generate(ids, use_cache=False, **greedy))


@pytest.mark.parametrize("options", FAMILIES, ids=named)
def test_calibration_and_healing(make_model, options, prose, tmp_path):
    source = make_model(**options)
    text = td.Calibration(text=[prose], tokens=4096)
    td.convert(source, tmp_path / "raw", PLAN)
    td.convert(source, tmp_path / "calibrated", PLAN, calibration=text)
    healing = td.Healing(
        text=(TextPart(str(prose)),),
        tokens=4096,
        sequence_length=64,
        batch_size=4,
        micro_batch_size=4,
        learning_rate=1e-3,
    )
    td.heal(tmp_path / "calibrated", tmp_path / "healed", teacher=source, healing=healing)
    raw, calibrated, healed = (
        td.perplexity(tmp_path / name, against=source, text=prose, window=64, windows=16).kl
        for name in ("raw", "calibrated", "healed")
    )
    assert healed < calibrated < raw


def test_layers_that_attend_differently_are_not_joined(make_model, tmp_path):
    source = make_model(family=Qwen2Config, **WINDOW, max_window_layers=3)
    with pytest.raises(td.TruedepthError, match=r"\[2, 3\] cannot be joined: they attend diff"):
        td.convert(source, tmp_path / "out", PLAN)
    plan = td.Plan(6, [[0, 1], [3, 4]])
    td.convert(source, tmp_path / "out", plan)
    kinds = json.loads((tmp_path / "out/config.json").read_text())["layer_types"]
    assert kinds == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert td.load(tmp_path / "out").model(random_ids()).logits.isfinite().all()


@pytest.mark.parametrize("options", FAMILIES, ids=named)
def test_info_and_predict(make_model, options, tmp_path):
    source = make_model(**options)
    td.convert(source, tmp_path / "out", PLAN)
    for model in (source, tmp_path / "out"):
        said = CliRunner().invoke(app, ["info", str(model)])
        assert said.exit_code == 0 and options["family"].model_type in said.output
        assert td.predict(model, PLAN if model == source else None).speedup > 0
    assert inspect_model(source).head_dim == options.get("head_dim", TINY["hidden_size"] // 4)
