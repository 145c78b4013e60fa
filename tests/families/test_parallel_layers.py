"""Families whose attention and FFN read one state already: a stage holds whole layers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from family_models import WITHOUT_TRUEDEPTH, options_of, repaired, staged
from over_ranks import found_over_two_ranks
from tiny_models import left_padded_logits, random_ids
from truedepth.inspection import inspect_model
from truedepth.plan.config import plan_of

CASES = ["cohere", "cohere, norms", "cohere2", "pythia"]
PLAN = td.Plan(6, stages=[["A0", "F0", "A1", "F1"], ["A2", "F2"], ["A4", "F4", "A5", "F5"]])
EXACT = td.Plan(6, stages=[[f"A{k}", f"F{k}"] for k in range(6)])
CLOSE = {"atol": 1e-4, "rtol": 0}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def reference(source, ids, plan):
    """Logits of the original's own sub-layers; a layer's FFN reads what its attention reads."""
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    stages = [list(map(str, stage)) for stage in plan.stages]
    whole = []
    for stage in stages:
        if stage == [f"F{stage[0][1:]}"] and whole[-1] == [f"A{stage[0][1:]}"]:
            whole[-1] += stage
        else:
            whole.append(stage)
    return original, staged(original, ids, whole)


@pytest.mark.parametrize("case", CASES)
def test_stages_of_whole_layers_are_exact(make_model, case, tmp_path):
    source, ids = make_model(**options_of(case)), random_ids()
    done = td.convert(source, tmp_path / "out", PLAN)
    assert done.executed_plan.all_reduces == 5
    original, expected = reference(source, ids, PLAN)
    assert (original(ids).logits - expected).abs().max() > 1e-2
    written, before = td.open_source(tmp_path / "out"), td.open_source(source).tensors
    assert plan_of(written.config) == PLAN
    assert all(torch.equal(written.tensors[n].read(), t.read()) for n, t in before.items())
    model = td.load(tmp_path / "out").model
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        torch.testing.assert_close(left_padded_logits(model, ids), expected, **CLOSE)
        tokens = model.generate(ids, **GREEDY)
        assert torch.equal(tokens, model.generate(ids, use_cache=False, **GREEDY))
        if case != "pythia":  # its maps are packed by head
            torch.testing.assert_close(td.fuse(model)(ids).logits, expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_as_a_stage_loses_nothing(make_model, case, prose, tmp_path):
    """Calibration has nothing to do, and healing says so."""
    source, ids = make_model(**options_of(case)), random_ids()
    text = td.Calibration([prose], tokens=2048)
    done = td.convert(source, tmp_path / "out", EXACT, calibration=text)
    assert done.executed_plan.all_reduces == 6 and done.calibration is None
    original, model = (td.load(each).model for each in (source, tmp_path / "out"))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, original(ids).logits, **CLOSE)
    with pytest.raises(td.TruedepthError, match="nothing to heal"):
        td.heal(tmp_path / "out", tmp_path / "healed", teacher=source)


def test_a_stage_costs_one_all_reduce(make_model, tmp_path):
    ids, cases = random_ids(), ["cohere", "cohere2", "pythia"]
    for case in cases:
        td.convert(make_model(**options_of(case)), tmp_path / f"{case}-some", PLAN)
        td.convert(make_model(**options_of(case)), tmp_path / f"{case}-exact", EXACT)
    names = [f"{case}-{kind}" for case in cases for kind in ("some", "exact")]
    for found in found_over_two_ranks(tmp_path, names, ids):
        for name, own in found.items():
            assert own["all_reduces"] == (5 if name.endswith("some") else 6), name
            case, plan = name.split("-")[0], PLAN if name.endswith("some") else EXACT
            _, expected = reference(make_model(**options_of(case)), ids, plan)
            torch.testing.assert_close(own["logits"], expected, **CLOSE)


def test_a_fresh_process_without_truedepth(make_model, tmp_path):
    torch.save(random_ids(), tmp_path / "ids")
    where = {}
    for case in CASES:
        where[case] = str(tmp_path / case.replace(", ", "-"))
        td.convert(make_model(**options_of(case)), where[case], PLAN)
    given = [str(tmp_path / "ids"), json.dumps(where), str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", WITHOUT_TRUEDEPTH, *given], check=True)
    for case, logits in torch.load(tmp_path / "found").items():
        _, expected = reference(make_model(**options_of(case)), random_ids(), PLAN)
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("case", ["cohere", "cohere2", "pythia"])
def test_stages_are_calibrated_and_healed(make_model, case, prose, tmp_path):
    source = make_model(**options_of(case))
    plan = td.Plan(6, stages=[["A2", "F2", "A3", "F3"], ["A4", "F4"]])
    raw, calibrated, healed = repaired(source, plan, prose, tmp_path, learning_rate=3e-5)
    assert healed < calibrated < raw
    before, after = (td.open_source(tmp_path / name).tensors for name in ("raw", "healed"))
    changed = [n for n, t in before.items() if not torch.equal(t.read(), after[n].read())]
    assert {name.split(".layers.")[1][0] for name in changed} == {"2", "3"}


def test_a_search_takes_what_is_free_first(make_model, prose):
    model = make_model(**options_of("cohere2"))
    text = td.Calibration([prose], tokens=2048, window=64)
    free = td.search(model, all_reduces=6, calibration=text)
    assert free.plan.merged == EXACT.merged and abs(free.loss.excess) < 1e-6
    found = td.search(model, all_reduces=5, calibration=text)
    assert sorted(map(len, found.plan.merged)) == [2, 2, 2, 2, 4]
    assert found.loss.kl > free.loss.kl


def test_what_info_says(make_model, tmp_path):
    source = make_model(**options_of("cohere2"))
    found = inspect_model(source)
    assert found.stages_of_whole_layers
    assert [saving.all_reduces_per_token for saving in found.savings] == [6, 5, 4, 3]
    td.convert(source, tmp_path / "out", PLAN)
    converted_cohere = tmp_path / "cohere"
    td.convert(make_model(**options_of("cohere")), converted_cohere, PLAN)
    found = inspect_model(tmp_path / "out")
    assert found.executed_plan == PLAN and not found.side_by_side
    assert "side by side" in inspect_model(converted_cohere).engines["vLLM"]
    for stage, runs in ((["A2", "F2"], True), (["A2", "F2", "A3", "F3"], False)):
        plan = td.Plan(6, stages=[{"sublayers": stage, "local": 2}])
        td.convert(make_model(**options_of("cohere")), tmp_path / f"local{len(stage)}", plan)
        found = inspect_model(tmp_path / f"local{len(stage)}")
        assert (found.engines["vLLM"] == "") == runs
    assert td.predict(tmp_path / "out").plan == PLAN


def test_sublayers_of_two_layers_are_refused(make_model, tmp_path):
    with pytest.raises(td.TruedepthError, match=r"stage \[F1 A2\]: .* holds whole layers"):
        td.convert(make_model(**options_of("cohere")), tmp_path / "out", td.Plan.staggered(6, 1, 3))
