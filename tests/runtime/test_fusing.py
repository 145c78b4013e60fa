"""Fused stages: the same function in fewer kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import truedepth as td
from family_models import CASES, options_of
from over_ranks import found_over_two_ranks
from tiny_models import left_padded_logits, random_ids
from truedepth.runtime.kv_cache import cache_argument

CLOSE = {"atol": 1e-4, "rtol": 0}
STAGES = td.Plan(6, stages=[["A0", "F0", "A1"], ["F2", "A3"], ["F4", "A5", "F5"]])
BESIDE_A_GROUP = td.Plan(6, [[1, 2]], stages=[["F3", "A4", "F4", "A5"]])
GROUP = td.Plan(6, [[1, 2], [3, 4, 5]])
BEHIND = ("gemma2", "gemma3", "olmo2", "olmo3", "glm4")
"""Families with norms behind their sub-layers."""

UNFUSED = {
    **dict.fromkeys(BEHIND, "a norm after its attention and FFN"),
    **dict.fromkeys(("pythia", "gpt-neox, sequential"), "cannot have more heads"),
}
FUSED = [case for case in CASES if case not in UNFUSED]


def fused(model):
    return td.fuse(copy.deepcopy(model))


def converted(source, plan, out):
    td.convert(source, out, plan, force=True)
    return td.load(out).model


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("plan", [td.Plan(6), GROUP, STAGES, BESIDE_A_GROUP], ids=str)
@torch.inference_mode()
def test_every_family(make_model, case, plan, tmp_path):
    source, ids = make_model(**options_of(case)), random_ids()
    try:
        model = converted(source, plan, tmp_path / "out")
    except td.TruedepthError as error:
        assert "cannot share the stage" in str(error)
        return
    if model.config.side_by_side:
        with pytest.raises(td.TruedepthError, match="some of its layers run side by side"):
            td.fuse(model)
        return
    same = fused(model)
    torch.testing.assert_close(same(ids).logits, model(ids).logits, **CLOSE)
    expected = left_padded_logits(model, ids)
    torch.testing.assert_close(left_padded_logits(same, ids), expected, **CLOSE)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(same.generate(ids, **greedy), model.generate(ids, **greedy))


@pytest.mark.parametrize("case", UNFUSED)
def test_families_that_do_not_fold(make_model, case):
    model = td.load(make_model(**options_of(case))).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(td.TruedepthError, match=UNFUSED[case]):
        td.fuse(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_original_loaded_by_transformers(make_model):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_model(**options_of("llama")))
    with torch.inference_mode():
        expected = model(random_ids()).logits
        torch.testing.assert_close(td.fuse(model)(random_ids()).logits, expected, **CLOSE)


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory):
    source = make_model(attention_bias=True)
    return converted(source, STAGES, tmp_path_factory.mktemp("fused") / "out")


def test_merged_stages_are_one_norm_and_two_products(model):
    parts = [list(layer.parts) for layer in fused(model).model.layers]
    assert [[len(part.members) for part in own] for own in parts] == [
        [2],  # A0 F0, to which A1 is added
        [1, 1],
        [1],
        [2, 1],  # F2 A3
        [1],
        [3],  # F4 A5 F5
    ]
    (last,) = parts[5]
    assert last.read.weight.shape == (4 * 96 + 64 + 32 + 32, 64)
    assert last.write.weight.shape == (64, 2 * 96 + 64)
    assert torch.equal(last.norm.weight, torch.ones(64))


@pytest.mark.parametrize(
    "compiler", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_cached_decoding(model, compiler):
    """Plain and compiled as a whole, as a static cache allows."""
    ids, same = random_ids(), fused(model)
    cache = StaticCache(same.config, max_cache_len=32) if compiler else DynamicCache()
    given = cache_argument(same, cache)
    step = torch.compile(same, fullgraph=True, backend=compiler) if compiler else same
    logits = [same(ids[:, :5], **given).logits]
    for position in range(5, 9):
        positions = torch.full((2, 1), position)
        token = ids[:, position : position + 1]
        logits.append(step(token, position_ids=positions, **given).logits)
    expected = model(ids[:, :9]).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)


@torch.inference_mode()
def test_the_dtype_may_change_afterwards(model):
    same = fused(model).to(torch.float64)
    assert {parameter.dtype for parameter in same.parameters()} == {torch.float64}
    expected = model(random_ids()).logits
    torch.testing.assert_close(same(random_ids()).logits.float(), expected, **CLOSE)


def test_fusing_twice_changes_nothing(model):
    same = fused(model)
    parts = [layer.parts for layer in same.model.layers]
    assert td.fuse(same) is same
    assert all(a is layer.parts for a, layer in zip(parts, same.model.layers, strict=True))


def test_a_fused_model_cannot_be_saved(model, tmp_path):
    with pytest.raises(td.TruedepthError, match="cannot be saved"):
        fused(model).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_maps_that_are_no_longer_plain(model):
    class Adapted(nn.Module):
        weight = torch.zeros(1)

    changed = copy.deepcopy(model)
    changed.model.layers[5].mlp.up_proj = Adapted()
    with pytest.raises(td.TruedepthError, match=r"mlp\.up_proj is a Adapted"):
        td.fuse(changed)
    assert isinstance(changed.model.layers[0].mlp.up_proj, nn.Linear)


OVER_RANKS = {"llama": STAGES, "qwen2": STAGES, "granite": STAGES, "starcoder2": STAGES}
OVER_RANKS |= {"cohere": GROUP, "qwen3": GROUP, "phi3": STAGES}


def test_over_two_ranks(make_model, tmp_path):
    ids = random_ids()
    for case, plan in OVER_RANKS.items():
        td.convert(make_model(**options_of(case)), tmp_path / case, plan)
    for found in found_over_two_ranks(tmp_path, OVER_RANKS, ids, "fused"):
        assert "packs several maps" in found.pop("phi3")["fused"]
        for case, own in found.items():
            logits, all_reduces = own["fused"]
            stages = len(OVER_RANKS[case].stages) // (2 if case == "cohere" else 1)
            assert all_reduces == stages, case
            with torch.inference_mode():
                expected = td.load(tmp_path / case).model(ids).logits
            torch.testing.assert_close(logits, expected, **CLOSE)
