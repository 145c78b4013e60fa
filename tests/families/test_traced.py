"""Families that are found by running a small model: stages against the model's own layers."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from family_models import CASES, WITHOUT_TRUEDEPTH, options_of, repaired, staged
from over_ranks import found_over_two_ranks
from tiny_models import TINY, byte_tokenizer, left_padded_logits, random_ids
from traced_models import ARCHITECTURES, MIXTURES, OTHERS, WHOLE, config_of, is_sharded, model_of
from truedepth.families.lookup import all_families
from truedepth.families.tracing.trace import traced_family
from truedepth.inspection import inspect_model

PLAN = td.Plan(6, stages=[["A0", "F0", "A1"], ["F2", "A3"], ["F4", "A5", "F5"]])
CLOSE = {"atol": 1e-4, "rtol": 0}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
EACH = [
    *MIXTURES,
    *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS),
]
SOME = [
    pytest.param(list(MIXTURES), id="mixtures"),
    pytest.param(list(OTHERS), id="others", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(architecture)` gives a model and its directory; cached."""
    made = {}

    def make(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            model = model_of(name)
            model.save_pretrained(directory)
            byte_tokenizer().save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return make


def expected_logits(model, ids):
    return staged(model, ids, [list(map(str, stage)) for stage in PLAN.stages])


def test_at_least_forty_architectures():
    described = {options_of(case)["family"].model_type for case in CASES}
    assert len(described | ARCHITECTURES.keys()) >= 60
    assert len(ARCHITECTURES) >= 40


@pytest.mark.parametrize("name", EACH)
def test_stages_are_exact(saved, name, tmp_path):
    original, source = saved(name)
    ids, out = random_ids(), tmp_path / "out"
    td.convert(source, out, PLAN)
    before, after = td.open_source(source).tensors, td.open_source(out).tensors
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.read(), after[key].read()) for key, tensor in before.items())
    expected = expected_logits(original, ids)
    assert (original(ids).logits - expected).abs().max() > 1e-2
    model = td.load(out).model
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        torch.testing.assert_close(left_padded_logits(model, ids), expected, **CLOSE)
        tokens = model.generate(ids, **GREEDY)
        assert torch.equal(tokens, model.generate(ids, use_cache=False, **GREEDY))
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)
    kept = td.open_source(tmp_path / "again").tensors
    assert kept.keys() == before.keys()


def chosen(model, run):
    """By router: the experts that it chooses for each token, each time that `run` calls it."""
    found, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router", "block_sparse_moe.gate")):

            def keep(module, given, output, name=name):
                parts = output if isinstance(output, tuple) else (output,)
                whole = [part for part in parts if not part.is_floating_point()]
                scores = parts[0].reshape(-1, parts[0].shape[-1])
                choice = whole[0].sort(-1).values if whole else scores.topk(2).indices
                found.setdefault(name, []).append(choice)

            hooks.append(module.register_forward_hook(keep))
    run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_choose_the_same_experts(saved, name, tmp_path):
    original, source = saved(name)
    ids = random_ids()
    td.convert(source, tmp_path / "out", PLAN)
    model = td.load(tmp_path / "out").model
    reference = chosen(original, lambda: expected_logits(original, ids))
    with torch.inference_mode():
        found = chosen(model, lambda: model(ids))
    assert len(reference) >= 3
    for router, (plain, _, choice, _) in reference.items():  # all layers; A; F; all layers
        assert torch.equal(found[router][0], choice), router
        assert router.startswith("model.layers.0.") or not torch.equal(plain, choice), router


@pytest.mark.parametrize("names", SOME)
def test_a_fresh_process_without_truedepth(saved, tmp_path, names):
    torch.save(random_ids(), tmp_path / "ids")
    for name in names:
        td.convert(saved(name)[1], tmp_path / name, PLAN)
    where = json.dumps({name: str(tmp_path / name) for name in names})
    given = [str(tmp_path / "ids"), where, str(tmp_path / "found")]
    subprocess.run([sys.executable, "-c", WITHOUT_TRUEDEPTH, *given], check=True)
    for name, logits in torch.load(tmp_path / "found").items():
        expected = expected_logits(saved(name)[0], random_ids())
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("names", SOME)
def test_a_stage_costs_one_all_reduce(saved, tmp_path, names):
    """At most: of what transformers gives every rank whole, a stage alone costs none."""
    names = [name for name in names if is_sharded(name)]
    for name in names:
        td.convert(saved(name)[1], tmp_path / name, PLAN)
    for found in found_over_two_ranks(tmp_path, names, random_ids()):
        for name, own in found.items():
            expected = expected_logits(saved(name)[0], random_ids())
            torch.testing.assert_close(
                own["logits"], expected, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert own["all_reduces"] == len(PLAN.stages) - WHOLE.get(name, 0), name


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "glm4_moe"])
def test_mixtures_are_calibrated_and_healed(saved, name, prose, tmp_path):
    source, plan = saved(name)[1], td.Plan.staggered(6, 1, 4)
    raw, calibrated, healed = repaired(source, plan, prose, tmp_path)
    assert healed < calibrated < raw
    before, after = (td.open_source(tmp_path / each).tensors for each in ("raw", "healed"))
    changed = {
        key for key, tensor in before.items() if not torch.equal(tensor.read(), after[key].read())
    }
    assert changed
    assert not any(
        re.search(r"\.(experts\.|gate\.|router\.|shared_expert_gate)", n) for n in changed
    )


@pytest.mark.parametrize("case", CASES)
def test_a_trace_finds_what_the_files_say(case):
    """Two ways to the same names; of parallel layers that share a norm it says that they are."""
    config = options_of(case)
    family = config.pop("family")
    model_type = family.model_type
    (described,) = (each for each in all_families() if each.model_type == model_type)
    whole = family(**copy.deepcopy(TINY | config))
    if described.is_parallel(whole):
        return
    found = traced_family(whole.to_dict())
    for part in ("attention", "ffn", "multiplier", "layer", "outside", "classes"):
        assert getattr(found, part) == getattr(described, part), part
    assert set(found.reads) == set(described.reads)
    assert set(found.writes) == set(described.writes)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("mamba", "they run norm -> mixer"),
        ("falcon_h1", "mamba; self_attn"),
        ("jamba", "layer 0 has mamba and feed_forward, layer 4 self_attn"),
        ("gpt2", "must give num_hidden_layers"),
        ("opt", "not in a list `layers`"),
        ("no_such_model", "not supported"),
    ],
)
def test_what_does_not_hold_is_refused_with_the_reason(model_type, words, tmp_path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = {"model_type": model_type, "num_hidden_layers": 2, "hidden_size": 8}
    if model_type in CONFIG_MAPPING:
        config = CONFIG_MAPPING[model_type]().to_dict() | {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(td.TruedepthError, match=re.escape(words)):
        inspect_model(tmp_path)


def test_info_needs_the_config_alone(tmp_path):
    config_of("deepseek_v3").save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    assert not found.stages_of_whole_layers
    assert found.side_by_side_reason == "its FFN is a mixture of experts"
