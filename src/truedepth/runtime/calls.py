"""How a model calls the attention of its layers: masks, rotary embeddings, positions.

It is recorded from a forward pass of the model's own code in which the layers add nothing, so
nothing of a family's model code is repeated here, and layers need no weights for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.families.family import Family

Calls = Sequence[Mapping[str, Any]]
"""One call per layer: its attention's arguments for some windows, except the hidden states."""


@torch.inference_mode()
def record(model: Any, family: Family, ids: Tensor) -> tuple[Tensor, Calls]:
    """What enters a model's first layer, and how the model calls every layer's attention.

    Args:
        model: transformers' own; its layers may be without weights.
        family: Where the sub-layers and norms of a layer are.
        ids: `[windows, length]` int64.

    Returns:
        `[windows, length, hidden]` float32, and one call per layer.
    """
    calls: list[dict[str, Any]] = []
    with _hollow(model.base_model.layers, family, _Recorder(calls)):
        model.base_model(ids, use_cache=False)
    states = [call.pop("hidden_states") for call in calls]
    return states[0].float(), calls


@contextmanager
def _hollow(layers: Sequence[nn.Module], family: Family, recorder: nn.Module) -> Iterator[None]:
    """The layers' own code around an attention that only records what it is called with."""
    attention, ffn = family.sublayers
    norms = (attention.norm, attention.post_norm, ffn.norm, ffn.post_norm)
    stand_ins: dict[str, nn.Module] = {norm: nn.Identity() for norm in norms if norm is not None}
    stand_ins |= {ffn.module: _Nothing(), attention.module: recorder}
    own = [{name: layer.get_submodule(name) for name in stand_ins} for layer in layers]
    try:
        for layer in layers:
            for name, stand_in in stand_ins.items():
                layer.set_submodule(name, stand_in)
        yield
    finally:
        for layer, modules in zip(layers, own, strict=True):
            for name, module in modules.items():
                layer.set_submodule(name, module)


class _Recorder(nn.Module):
    """In an attention's place: keeps what it was called with, and adds nothing."""

    def __init__(self, calls: list[dict[str, Any]]) -> None:
        super().__init__()
        self._calls = calls

    def forward(self, hidden_states: Tensor, **call: Any) -> tuple[Tensor, None]:
        self._calls.append({"hidden_states": hidden_states, **call})
        return torch.zeros_like(hidden_states), None


class _Nothing(nn.Module):
    """In an FFN's place: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)
