"""Wide layers against the paper's formula, computed with the original's own layers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from tiny_models import random_ids, reference_logits
from truedepth.families.llama import LLAMA
from truedepth.tensors import from_tensor
from truedepth.widening.widen import widen

GROUPINGS = {
    "pairs": [[0], [1, 2], [3, 4], [5]],
    "first layer": [[0, 1], [2], [3], [4], [5]],
    "last layer": [[0], [1], [2], [3], [4, 5]],
    "threes": [[0, 1, 2], [3, 4, 5]],
    "four": [[0], [1, 2, 3, 4], [5]],
    "mixed sizes": [[0, 1, 2], [3], [4, 5]],
    "all in one": [[0, 1, 2, 3, 4, 5]],
}

VARIANTS = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"head_dim": 32},
    "all biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
}


def convert_and_compare(source, groups, tmp_path):
    plan = td.Plan(6, groups)
    td.convert(source, tmp_path / "out", plan)
    original = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    expected = reference_logits(original, random_ids(), plan.groups)
    logits = td.load(tmp_path / "out").model(random_ids()).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    return original, expected


@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
def test_every_grouping_is_exact(make_model, groups, tmp_path):
    original, expected = convert_and_compare(make_model(), groups, tmp_path)
    apart = (original(random_ids()).logits - expected).abs().max()
    assert apart > 1e-2  # or the check above would pass for a model that was not paired at all


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_exact(make_model, options, tmp_path):
    convert_and_compare(make_model(**options), GROUPINGS["mixed sizes"], tmp_path)


@pytest.mark.parametrize("ranks", [2, 5, 8])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_padded_heads_change_nothing(make_model, options, ranks, tmp_path):
    source = make_model(**options | {"intermediate_size": 240})
    plan = td.Plan(6, GROUPINGS["mixed sizes"])
    td.convert(source, tmp_path / "as it is", plan)
    td.convert(source, tmp_path / "padded", plan, pad_heads=ranks)
    expected, model = (td.load(tmp_path / name).model for name in ("as it is", "padded"))
    assert model.config.num_key_value_heads % ranks == 0
    assert model.config.num_attention_heads % ranks == 0
    logits = model(random_ids()).logits
    torch.testing.assert_close(logits, expected(random_ids()).logits, atol=1e-5, rtol=0)


def test_padding_needs_a_width_that_divides(make_model, tmp_path):
    with pytest.raises(td.TruedepthError, match=r"FFN's width \d+ is not divisible by 7 ranks"):
        td.convert(make_model(), tmp_path / "out", td.Plan(6), pad_heads=7)
    with pytest.raises(td.TruedepthError, match="pad_heads must be at least 1, not 0"):
        td.convert(make_model(), tmp_path / "out", td.Plan(6), pad_heads=0)


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_singles_are_copied_bit_for_bit(make_model, tmp_path, shard_size):
    source = make_model(dtype=torch.bfloat16)
    td.convert(source, tmp_path / "out", td.Plan(6), shard_size=shard_size)
    before = td.open_source(source).tensors
    after = td.open_source(tmp_path / "out").tensors
    assert set(before) == set(after)
    for name in before:
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(before[name].read(), after[name].read())


def test_singles_beside_groups_are_copied_bit_for_bit_and_renumbered(make_model, tmp_path):
    source = make_model(dtype=torch.bfloat16)
    td.convert(source, tmp_path / "out", td.Plan(6, [[1, 2], [3, 4]]))
    before = td.open_source(source).tensors
    after = td.open_source(tmp_path / "out").tensors
    for name in LLAMA.modules:
        old, new = f"model.layers.5.{name}.weight", f"model.layers.3.{name}.weight"
        assert torch.equal(before[old].read(), after[new].read())


def two_layers(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def layer():
        shapes = {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
        shapes |= dict.fromkeys(LLAMA.reads, (6, 8)) | dict.fromkeys(LLAMA.writes, (8, 6))
        return {f"{name}.weight": torch.randn(s, generator=generator) for name, s in shapes.items()}

    return layer(), layer()


def lazy(layer):
    return {name: from_tensor(tensor) for name, tensor in layer.items()}


@pytest.mark.parametrize("norm", LLAMA.norms)
def test_a_gain_reaches_its_own_layer_only(norm):
    """The paper's code gives half of each FFN the other layer's gain; this fails if ours does."""
    first, second = two_layers()
    before = {k: t.read() for k, t in widen(LLAMA, [lazy(first), lazy(second)]).items()}
    second[f"{norm}.weight"] = second[f"{norm}.weight"] * 3
    after = {k: t.read() for k, t in widen(LLAMA, [lazy(first), lazy(second)]).items()}
    for name, tensor in before.items():
        changed = after[name] != tensor
        if name.removesuffix(".weight") in LLAMA.reads_behind(norm):
            assert not changed[:6].any(), "the first layer's rows"
            assert changed[6:].all(), "the second layer's rows"
        else:
            assert not changed.any()


def test_a_gain_on_the_wrong_layers_ffn_would_be_noticed(make_model, tmp_path):
    """With the paper's bug put into a converted model, the logits leave the tolerance by far."""
    td.convert(make_model(), tmp_path / "out", td.Plan(6, GROUPINGS["pairs"]))
    original = AutoModelForCausalLM.from_pretrained(make_model(), attn_implementation="eager")
    expected = reference_logits(original, random_ids(), GROUPINGS["pairs"])
    model = td.load(tmp_path / "out").model
    gains = [original.model.layers[i].post_attention_layernorm.weight.data for i in (1, 2)]
    mlp = model.model.layers[1].mlp
    for weight in (mlp.gate_proj.weight.data, mlp.up_proj.weight.data):
        weight[96:] *= gains[0] / gains[1]  # the second layer's rows with the first layer's gain
    assert (model(random_ids()).logits - expected).abs().max() > 100 * 1e-4


def test_folding_is_done_in_float32_and_rounded_once():
    layers = [{k: t.to(torch.bfloat16) for k, t in layer.items()} for layer in two_layers()]
    wide = widen(LLAMA, [lazy(layer) for layer in layers])
    exact = torch.cat(
        [
            layer["mlp.up_proj.weight"].double() * layer["post_attention_layernorm.weight"].double()
            for layer in layers
        ]
    )
    assert torch.equal(wide["mlp.up_proj.weight"].read(), exact.to(torch.bfloat16))
    unrounded = widen(LLAMA, [lazy(layer) for layer in layers], torch.float32)
    assert torch.equal(unrounded["mlp.up_proj.weight"].read(), exact.float())


def test_wide_tensors_are_read_in_any_blocks():
    first, second = two_layers()
    for tensor in widen(LLAMA, [lazy(first), lazy(second)]).values():
        whole = tensor.read()
        for size in (1, 100, 300, 10**6):
            assert torch.equal(torch.cat(list(tensor.blocks(size))), whole)


def test_unknown_tensors_are_refused():
    first, second = two_layers()
    first["self_attn.q_norm.weight"] = second["self_attn.q_norm.weight"] = torch.ones(6)
    with pytest.raises(td.TruedepthError, match=r"self_attn\.q_norm\.weight.*llama"):
        widen(LLAMA, [lazy(first), lazy(second)])


def test_layers_that_differ_are_refused():
    first, second = two_layers()
    second["mlp.up_proj.weight"] = torch.ones(7, 8)
    with pytest.raises(td.TruedepthError, match=r"differ in the shape of 'mlp\.up_proj\.weight'"):
        widen(LLAMA, [lazy(first), lazy(second)])
    first, second = two_layers()
    del second["mlp.up_proj.weight"]
    with pytest.raises(td.TruedepthError, match="Only some"):
        widen(LLAMA, [lazy(first), lazy(second)])
    del first["mlp.up_proj.weight"]
    with pytest.raises(td.TruedepthError, match="lacks the tensor"):
        widen(LLAMA, [lazy(first), lazy(second)])
