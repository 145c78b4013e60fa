"""Columns of FFNs go to the ranks that need them, and the model stays the same."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import truedepth as td
from family_models import CASES, options_of
from tiny_models import TINY, byte_tokenizer, random_ids, random_model
from traced_models import MIXTURES, NOT_LOCAL, OTHERS, model_of
from truedepth.calibration.columns import Moments
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.ridge import Regression
from truedepth.calibration.trajectories import Walk
from truedepth.runtime.layer_stack import LayerStack
from truedepth.widening.layout import Layout

IDS = random_ids(batch=12, length=40)
PARALLEL = ("cohere", "cohere, norms", "cohere2", "pythia")


def arranged(model, stages, monkeypatch):
    """Weights of local stages for two ranks whose maps are not refitted, by name."""
    monkeypatch.setattr(Regression, "_choose", lambda *_: (1.0, 1.0, math.inf))
    source = td.open_source(model)
    plan = td.Plan(6, stages=[{"sublayers": stage, "local": 2} for stage in stages])
    stack = LayerStack(source, device="cpu", dtype=torch.float32)
    walk = Walk(stack, Layout(source, plan), IDS, batch_size=5)
    calibrator, found = Calibrator(walk), {}
    for segment in walk.layout.segments:
        if walk.layout.is_merged(segment):
            found |= calibrator.refit(segment).weights
        else:
            walk.advance(segment)
    return found


@torch.no_grad()
def check_same(case, original, model, monkeypatch):
    """The model computes the same with the weights of its stages, whose columns have moved."""
    stages = [["A0", "F0", "A1"], ["F2", "A3"], ["F4", "A5", "F5"]]
    if case in PARALLEL:
        stages = [["A0", "F0", "A1", "F1"], ["A3", "F3", "A4", "F4"]]
    found = arranged(model, stages, monkeypatch)
    before = original(IDS).logits
    state = original.state_dict()
    moved = {name for name, weight in found.items() if not torch.equal(weight, state[name])}
    original.load_state_dict({**state, **found})
    torch.testing.assert_close(original(IDS).logits, before, atol=1e-4, rtol=1e-4)
    return moved


@pytest.mark.parametrize("case", CASES)
def test_a_model_stays_the_same(make_model, case, monkeypatch):
    model = make_model(**options_of(case))
    original = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    moved = check_same(case, original, model, monkeypatch)
    ffns = {name.split(".mlp.")[0] for name in moved if ".mlp." in name}
    assert len(ffns) == 4, moved


TRACED = [each for each in (*MIXTURES, *OTHERS) if each not in NOT_LOCAL]


@pytest.mark.slow
@pytest.mark.parametrize("case", TRACED)
def test_a_traced_model_stays_the_same(case, tmp_path, monkeypatch):
    original = model_of(case)
    original.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    check_same(case, original, tmp_path, monkeypatch)


def test_experts_stay_where_they_are(tmp_path, monkeypatch):
    original = model_of("mixtral")
    original.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert check_same("mixtral", original, tmp_path, monkeypatch) == set()


@torch.no_grad()
def planted(model, own):
    """A model in which one half of every layer's inner features lives in one half of the hidden
    state, and one half of the heads too.

    Args:
        model: Of two KV heads.
        own: To which half each column belongs, `[columns]`.
    """

    def keep(weight, halves):
        rows, columns = halves
        weight *= rows[:, None] == columns

    hidden = torch.arange(64) // 32
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for map_ in (attention.q_proj, attention.k_proj, attention.v_proj):
            heads = torch.arange(len(map_.weight)) // (len(map_.weight) // 2)
            keep(map_.weight, (heads, hidden))
        keep(attention.o_proj.weight, (hidden, torch.arange(64) // 32))
        keep(mlp.gate_proj.weight, (own, hidden))
        keep(mlp.up_proj.weight, (own, hidden))
        keep(mlp.down_proj.weight, (hidden, own))


@pytest.mark.parametrize("stage", [["F1", "A2"], ["A1", "F1"], ["A1", "F1", "A2"]], ids=" ".join)
def test_columns_find_the_heads_that_are_their_own(stage, tmp_path, monkeypatch):
    config = AutoConfig.for_model("llama", **TINY)
    model, own = random_model(config), torch.arange(96).flip(0) % 2
    planted(model, own)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = arranged(tmp_path, [stage], monkeypatch)["model.layers.1.mlp.down_proj.weight"]
    first, second = found.chunk(2, 1)
    assert first[32:].count_nonzero() == second[:32].count_nonzero() == 0


def test_heads_and_columns_of_zeros_want_nothing(tmp_path, monkeypatch):
    """As --pad-heads adds them: the rank of such heads gets the columns that matter least."""
    model = random_model(AutoConfig.for_model("llama", **TINY))
    attention, mlp = model.model.layers[2].self_attn, model.model.layers[1].mlp
    with torch.no_grad():
        for map_ in (attention.q_proj, attention.k_proj, attention.v_proj):
            map_.weight.chunk(2)[1].zero_()
        for rows in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
            rows[::2] = 0
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = arranged(tmp_path, [["A1", "F1", "A2"]], monkeypatch)
    first, second = found["model.layers.1.mlp.down_proj.weight"].chunk(2, 1)
    assert first.isfinite().all() and second.count_nonzero() == 0


def test_sums_that_are_not_finite_are_refused():
    moments = Moments()
    moments.add(torch.ones(2, 5, 3), torch.full((2, 5, 4), torch.inf))
    with pytest.raises(td.TruedepthError, match="not finite"):
        moments.beside  # noqa: B018
