"""How a model calls its layers, recorded without running them, against an ordinary pass."""

from __future__ import annotations

import pytest
import torch

import truedepth as td
from family_models import CASES, options_of
from tiny_models import random_ids
from truedepth.runtime.calls import record
from truedepth.runtime.layer_stack import LayerStack

IDS = random_ids(batch=3, length=23)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_every_layer_is_called_as_in_an_ordinary_pass(make_model, case):
    loaded = td.load(make_model(**options_of(case)), dtype=torch.float32)
    model, family = loaded.model, loaded.source.family
    layers = list(model.base_model.layers)
    expected, embedded = [], []
    hooks = [
        layer.get_submodule(family.attention.module).register_forward_pre_hook(
            lambda _, args, kwargs: expected.append(kwargs), with_kwargs=True
        )
        for layer in layers
    ]
    hooks.append(layers[0].register_forward_pre_hook(lambda _, args: embedded.append(args[0])))
    before = model(IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()

    states, calls = record(model, family, IDS)
    assert torch.equal(states, embedded[0].float())
    assert len(calls) == len(expected) == 6
    for call, ordinary in zip(calls, expected, strict=True):
        wanted = {name: value for name, value in ordinary.items() if name != "hidden_states"}
        assert call.keys() == wanted.keys()
        for name, value in wanted.items():
            assert _same(call[name], value), name
    assert torch.equal(model(IDS, use_cache=False).logits, before), "the layers are back"

    stack = LayerStack(loaded.source, device="cpu", dtype=torch.float32)
    again, others = stack.start(IDS)
    assert torch.equal(again, states)
    assert all(_same(a[k], b[k]) for a, b in zip(calls, others, strict=True) for k in a)


def _same(one, other):
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


def test_the_layers_are_put_back_when_the_pass_fails(make_model):
    loaded = td.load(make_model())
    attention = loaded.model.model.layers[3].self_attn
    with pytest.raises(IndexError):
        record(loaded.model, loaded.source.family, torch.full((1, 4), 10**6))
    assert loaded.model.model.layers[3].self_attn is attention
