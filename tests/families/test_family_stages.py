"""Stages of sub-layers, for every family against its own layers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from family_models import CAPPED, CASES, options_of, repaired, staged
from over_ranks import found_over_two_ranks
from tiny_models import left_padded_logits, random_ids
from truedepth.plan.config import plan_of

CLOSE = {"atol": 1e-4, "rtol": 0}
REFUSED = {
    **dict.fromkeys(("cohere", "cohere, norms", "cohere2"), "read one state already"),
    **dict.fromkeys(("pythia",), "read one state already"),
}
STAGED = [case for case in CASES if case not in REFUSED]

FIRST_AND_LAST = td.Plan(6, stages=[["A0", "F0", "A1"], ["F2", "A3"], ["F4", "A5", "F5"]])
BESIDE_A_GROUP = td.Plan(6, [[1, 2]], stages=[["F3", "A4"], ["F4", "A5"]])


@pytest.mark.parametrize("case", STAGED)
@pytest.mark.parametrize("plan", [FIRST_AND_LAST, BESIDE_A_GROUP], ids=str)
def test_stages_are_exact(make_model, case, plan, tmp_path):
    source, ids = make_model(**options_of(case)), random_ids()
    done = td.convert(source, tmp_path / "out", plan)
    wide = max(td.open_source(tmp_path / "out").config["layer_widths"]) > 1
    merges = sum(len(stage) - 1 for stage in plan.merged)
    assert done.executed_plan.all_reduces == 12 - merges - 2 * wide
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    expected = staged(original, ids, [list(map(str, stage)) for stage in plan.stages])
    assert (original(ids).logits - expected).abs().max() > 1e-2
    model = td.load(tmp_path / "out", attn_implementation=CAPPED.get(case)).model
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        torch.testing.assert_close(left_padded_logits(model, ids), expected, **CLOSE)
        greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        tokens = model.generate(ids, **greedy)
        assert torch.equal(tokens, model.generate(ids, use_cache=False, **greedy))


@pytest.mark.parametrize("case", STAGED)
def test_stages_change_the_config_alone(make_model, case, tmp_path):
    source = td.open_source(make_model(**options_of(case)))
    td.convert(source, tmp_path / "out", FIRST_AND_LAST)
    written = td.open_source(tmp_path / "out")
    assert written.tensors.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        assert torch.equal(written.tensors[name].read(), tensor.read())
    assert plan_of(written.config) == FIRST_AND_LAST


@pytest.mark.parametrize("case", REFUSED)
def test_families_whose_sublayers_cannot_share_a_stage(make_model, case, tmp_path):
    with pytest.raises(td.TruedepthError, match=f"cannot share the stage .*{REFUSED[case]}"):
        td.convert(make_model(**options_of(case)), tmp_path / "out", FIRST_AND_LAST)


@pytest.mark.parametrize("case", ["gemma2", "gemma3", "olmo2", "olmo3", "glm4"])
def test_norms_behind_are_calibrated_and_healed(make_model, case, prose, tmp_path):
    source, plan = make_model(**options_of(case)), td.Plan.staggered(6, 1, 4)
    raw, calibrated, healed = repaired(source, plan, prose, tmp_path)
    assert healed < calibrated < raw


CASES_OF_RANKS = [
    "llama",
    "qwen2",
    "granite",
    "starcoder2",
    "phi3",
    "glm",
    "gemma2",
    "olmo2",
    "glm4",
]
"""With and without biases, with a multiplier, and with norms behind."""


def test_a_stage_costs_one_all_reduce(make_model, tmp_path):
    ids = random_ids()
    for case in CASES_OF_RANKS:
        td.convert(make_model(**options_of(case)), tmp_path / case, FIRST_AND_LAST)
    for found in found_over_two_ranks(tmp_path, CASES_OF_RANKS, ids, "gradient"):
        for case, own in found.items():
            assert own["all_reduces"] == len(FIRST_AND_LAST.stages) == 7, case
            model = td.load(tmp_path / case).model
            output = model(ids, labels=ids)
            output.loss.backward()
            torch.testing.assert_close(own["logits"], output.logits, **CLOSE)
            expected = model.model.layers[2].mlp
            expected = getattr(expected, "down_proj", None) or expected.c_proj
            expected = expected.weight.grad
            torch.testing.assert_close(own["gradient"], expected, atol=1e-5, rtol=1e-4)
