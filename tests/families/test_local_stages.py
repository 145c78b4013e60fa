"""Rank-local stages, for every family against its own layers: simulated, and over real ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import truedepth as td
from family_models import CAPPED, CASES, WITHOUT_TRUEDEPTH, locally, options_of, repaired
from over_ranks import GREEDY, found_over_two_ranks
from tiny_models import byte_tokenizer, left_padded_logits, random_ids
from traced_models import MIXTURES, NOT_LOCAL, OTHERS, WHOLE, is_sharded, model_of
from truedepth.engines.support import VLLM_FAMILIES, VLLM_STAGES, refused_by
from truedepth.inspection import inspect_model
from truedepth.modeling.stages import wrong_ranks

CLOSE = {"atol": 1e-4, "rtol": 0}
PARALLEL = ("cohere", "cohere, norms", "cohere2", "pythia")
"""Families whose attention and FFN read one state: there stages hold whole layers."""

STAGES = [["A0", "F0", "A1"], ["F2", "A3"], ["F4", "A5", "F5"]]
WHOLE_LAYERS = [["A0", "F0", "A1", "F1"], ["A3", "F3", "A4", "F4"]]


def plan_of(case, ranks=2):
    stages = WHOLE_LAYERS if case in PARALLEL else STAGES
    return td.Plan(6, stages=[{"sublayers": stage, "local": ranks} for stage in stages])


def expected_logits(case, original, ids, plan):
    stages = [list(map(str, stage)) for stage in plan.stages]
    if case in PARALLEL:
        stages = [WHOLE_LAYERS[0], ("A2", "F2"), WHOLE_LAYERS[1], ("A5", "F5")]
    return locally(original, ids, stages, plan.ranks, case in PARALLEL)


def check_simulated(case, original, source, out):
    """Logits, padded on the left, and tokens with and without a cache; for two ranks."""
    plan, ids = plan_of(case), random_ids()
    td.convert(source, out, plan)
    expected = expected_logits(case, original, ids, plan)
    assert (original(ids).logits - expected).abs().max() > 1e-2
    model = td.load(out, attn_implementation=CAPPED.get(case)).model
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        torch.testing.assert_close(left_padded_logits(model, ids), expected, **CLOSE)
        tokens = model.generate(ids, **GREEDY)
        assert torch.equal(tokens, model.generate(ids, use_cache=False, **GREEDY))


@pytest.mark.parametrize("case", CASES)
def test_one_process_computes_what_two_ranks_would(make_model, case, tmp_path):
    source = make_model(**options_of(case))
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    check_simulated(case, original, source, tmp_path / "out")


@pytest.mark.parametrize(
    "case", [*MIXTURES, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_architectures_that_are_traced(case, tmp_path):
    original = model_of(case)
    original.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    if why := NOT_LOCAL.get(case):
        with pytest.raises(td.TruedepthError, match=why):
            td.convert(tmp_path / "source", tmp_path / "out", plan_of(case))
        return
    check_simulated(case, original, tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks(make_model, ranks, tmp_path):
    heads = {"num_attention_heads": 2 * ranks, "num_key_value_heads": ranks}
    source = make_model(hidden_size=96, **heads)
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    plan, ids = plan_of("llama", ranks), random_ids()
    td.convert(source, tmp_path / "out", plan)
    expected = expected_logits("llama", original, ids, plan)
    with torch.inference_mode():
        torch.testing.assert_close(td.load(tmp_path / "out").model(ids).logits, expected, **CLOSE)


def check_over_two_ranks(where, cases, fused=()):
    """Two processes give what one that simulates them does, in one all-reduce per stage."""
    ids = random_ids()
    for found in found_over_two_ranks(where, cases, ids, "tokens", "fused"):
        for case, own in found.items():
            model = td.load(where / case).model
            with torch.inference_mode():
                expected = model(ids).logits
                for logits in (own["logits"], *([own["fused"][0]] if case in fused else [])):
                    torch.testing.assert_close(
                        logits, expected, **CLOSE, msg=lambda m, c=case: c + m
                    )
                assert torch.equal(own["tokens"], model.generate(ids, **GREEDY)), case
            # a sub-layer alone that every rank has whole needs none
            alone = WHOLE.get(case, 0) - (case == "afmoe")  # A0, F0 and A1 are not alone
            assert own["all_reduces"] == len(plan_of(case).stages) - alone, case


RANKED = ["llama", "qwen2", "granite", "starcoder2", "phi3", "glm4", "gemma2", "olmo2", "cohere"]
"""With and without biases, with a multiplier, norms behind, packed maps and gathered ones."""


def test_two_ranks(make_model, tmp_path):
    for case in RANKED:
        td.convert(make_model(**options_of(case)), tmp_path / case, plan_of(case))
    check_over_two_ranks(tmp_path, RANKED, fused=["llama", "qwen2", "granite", "starcoder2"])


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(list(MIXTURES), id="mixtures"),
        pytest.param(list(OTHERS), id="others", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_of_architectures_that_are_traced(cases, tmp_path):
    cases = [case for case in cases if is_sharded(case) and case not in NOT_LOCAL]
    for case in cases:
        model_of(case).save_pretrained(tmp_path / "source")
        byte_tokenizer().save_pretrained(tmp_path / "source")
        td.convert(tmp_path / "source", tmp_path / case, plan_of(case))
    check_over_two_ranks(tmp_path, cases)


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_they_are_calibrated_and_healed(make_model, case, prose, tmp_path):
    """With and without norms behind the sub-layers; healed as the ranks would compute."""
    plan = td.Plan.staggered(6, 1, 4, ranks=2)
    raw, calibrated, healed = repaired(make_model(**options_of(case)), plan, prose, tmp_path)
    assert healed < calibrated < raw


def test_mixtures_and_latent_attentions_are_calibrated(prose, tmp_path):
    for case in ("mixtral", "deepseek_v3"):
        model_of(case).save_pretrained(tmp_path / case)
        byte_tokenizer().save_pretrained(tmp_path / case)
        text = td.Calibration([prose], tokens=2048, window=32)
        plan = td.Plan(6, stages=[{"sublayers": ["F2", "A3"], "local": 2}])
        done = td.calibrate(tmp_path / case, tmp_path / f"{case}-out", plan, text)
        (errors,) = done.calibration.held_out_errors.values()
        assert len(errors) == {"mixtral": 2 + 1, "deepseek_v3": 1 + 1}[case], errors
        assert all(each.after <= each.before for each in errors.values())


def test_a_fresh_process_without_truedepth(make_model, tmp_path):
    """It simulates the ranks if it is asked to, and else says who computes this model."""
    torch.save(random_ids(), tmp_path / "ids")
    td.convert(make_model(), tmp_path / "out", plan_of("llama"))
    given = [str(tmp_path / "ids"), json.dumps({"llama": str(tmp_path / "out")})]
    script = [sys.executable, "-c", WITHOUT_TRUEDEPTH, *given, str(tmp_path / "found")]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode and "so 2 ranks compute it, not 1; load it over 2" in done.stderr
    script[2] = script[2].replace(
        "trust_remote_code=True", "trust_remote_code=True, simulate_ranks=True"
    )
    subprocess.run(script, check=True)
    expected = td.load(tmp_path / "out").model(random_ids()).logits
    torch.testing.assert_close(torch.load(tmp_path / "found")["llama"], expected, **CLOSE)


def test_another_number_of_ranks_is_refused(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", plan_of("llama"))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    config.distributed_config = SimpleNamespace(tp_size=4)
    for simulate in (None, True):
        config.simulate_ranks = simulate
        with pytest.raises(ValueError, match=r"local to 2 tensor-parallel ranks, so 2 .* not 4"):
            AutoModelForCausalLM.from_config(config)


def test_where_queries_are_normed_over_all_ranks_vllm_does_not_run_them(make_model, tmp_path):
    families = (*VLLM_FAMILIES, *VLLM_STAGES)
    found = {each: refused_by(each, False, stages=True, local=True)["vLLM"] for each in families}
    why = "not with rank-local stages"
    assert {each: reason for each, reason in found.items() if reason} == dict.fromkeys(
        ("olmo2", "olmo3", "olmoe"), why
    )
    for case, reason in (("olmo2", why), ("gemma2", "")):
        td.convert(make_model(**options_of(case)), tmp_path / case, plan_of(case))
        assert inspect_model(tmp_path / case).engines["vLLM"] == reason
    td.convert(make_model(**options_of("olmo2")), tmp_path / "read", td.Plan(6, stages=STAGES))
    assert not inspect_model(tmp_path / "read").engines["vLLM"]


def test_ranks_that_all_hold_the_whole_layers_are_told_so():
    """As some releases of transformers have it for some models; others shard every model here."""
    said = wrong_ranks(local=2, ranks=1, processes=2)
    assert "local to 2" in said and "gives each of them all weights of its layers" in said
    assert "load it over 2" not in said and "simulate_ranks=True" in said
    assert "load it over 2" in wrong_ranks(local=2, ranks=1, processes=1)
