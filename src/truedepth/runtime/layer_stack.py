"""A decoder whose layers come into memory one at a time.

Embedding, final norm and output head are loaded when they are used; layers are built where they are
asked for, from lazy tensors, and are gone with the last reference. How the model calls its layers
(masks, rotary embeddings, positions) is recorded from a forward pass in which the layers do
nothing, so nothing of a family's model code is repeated here. The residual stream is float32,
whatever layers compute in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from truedepth.families.family import sublayers
from truedepth.modeling import run_sublayer
from truedepth.runtime.empty import empty_model
from truedepth.runtime.output_head import OutputHead
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor

Calls = list[dict[str, Any]]
"""What the attention of every layer is called with, but for the hidden states."""


class LayerStack:
    """The layers of one model, original or converted, and what is around them."""

    def __init__(
        self,
        source: Source,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, LazyTensor] | None = None,
        places: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Build the model without its weights.

        Args:
            source: The model, of a supported family.
            device: Where layers compute.
            dtype: In which.
            config: Of a conversion of that model; by default its own.
            tensors: Likewise.
            places: Of its groups, as `places_of_groups` gives them.
        """
        self._family = source.family
        self._tensors = source.tensors if tensors is None else tensors
        self.device, self._dtype = torch.device(device), dtype
        self._model: Any = empty_model(config or source.config, source.path, dtype)
        for name, buffer in self._model.named_buffers():
            set_module_tensor_to_device(self._model, name, self.device, buffer)
        self._empty = list(self._model.base_model.layers)
        self.places = places or [(index,) for index in range(len(self._empty))]
        self._sublayers = sublayers(self._family, self._model.config)
        self._head = OutputHead(self._model)
        self._calls: Calls = []
        self._model.base_model.layers = nn.ModuleList(map(self._hollow, self._empty))

        self._size = sum(
            math.prod(tensor.shape)
            for name, tensor in source.tensors.items()
            if self._family.split(name)[0] is not None
        )
        self._evaluated = 0

    @cached_property
    def _whole(self) -> Any:
        """The model with what is outside the layers: of a conversion nobody asks for it."""
        for name in [name for name, _ in self._model.named_parameters()]:
            if self._family.split(name)[0] is None and name in self._tensors:
                self._put(self._model, name, self._tensors[name])
        self._model.tie_weights()
        return self._model

    @property
    def token_passes(self) -> float:
        """Tokens that went through layers so far, in passes through all of the original's layers.

        A wide layer counts as its members do.
        """
        return self._evaluated / self._size

    @property
    def hidden_size(self) -> int:
        """Elements of a hidden state."""
        size: int = self._model.config.hidden_size
        return size

    def is_wide(self, group: int) -> bool:
        """Whether a group is one layer here."""
        return len(self.places[group]) == 1

    @property
    def config(self) -> Any:
        """The model's, transformers' own."""
        return self._model.config

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN read the same state."""
        return bool(self._sublayers["parallel"])

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights of a layer by name within it, in float32."""
        prefix = self._family.layer.format(index)
        return {
            name: self._tensors[prefix + name].read().float()
            for name, _ in self._empty[index].named_parameters()
        }

    def _hollow(self, layer: nn.Module) -> nn.Module:
        """The layer's own code around an attention that only records what it is called with."""
        hollow = copy.deepcopy(layer)
        attention, ffn = self._family.sublayers
        for name in (attention.norm, attention.post_norm, ffn.norm, ffn.post_norm):
            if name is not None:
                hollow.set_submodule(name, nn.Identity())
        hollow.set_submodule(ffn.module, _Nothing())
        hollow.set_submodule(attention.module, _Recorder(self._calls))
        return hollow

    def _put(self, module: nn.Module, name: str, tensor: LazyTensor) -> None:
        set_module_tensor_to_device(module, name, self.device, tensor.read(), dtype=self._dtype)

    def layer(self, index: int) -> nn.Module:
        """A layer with its weights."""
        layer: nn.Module = copy.deepcopy(self._empty[index])
        prefix = self._family.layer.format(index)
        for name, _ in list(layer.named_parameters()):
            self._put(layer, name, self._tensors[prefix + name])
        return layer

    def layers(self, group: int) -> list[nn.Module]:
        """The layers that run side by side for a group: one wide layer, or its branches."""
        return [self.layer(index) for index in self.places[group]]

    @torch.inference_mode()
    def start(self, ids: Tensor) -> tuple[Tensor, Calls]:
        """What enters the first layer, and how every layer is called.

        Args:
            ids: `[windows, length]` int64.

        Returns:
            `[windows, length, hidden]` float32, and one call a layer.
        """
        self._calls.clear()
        self._whole.base_model(ids.to(self.device), use_cache=False)
        calls = [dict(call) for call in self._calls]
        states = [call.pop("hidden_states") for call in calls]
        return states[0].float(), calls

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Of the last layer's output, `[positions, hidden]` to `[positions, vocabulary]`."""
        norm = self._whole.get_submodule(self._family.outside[1])
        return self._head(norm(x.to(self.device, self._dtype)))

    def branch(self, layer: nn.Module, number: int, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """`run_branch` of a layer of this stack."""
        body = self._family.sublayers[number].module
        size = sum(parameter.numel() for parameter in layer.get_submodule(body).parameters())
        self._evaluated += size * x.shape[0] * x.shape[1]
        return run_branch(self._sublayers, layer, number, x, call)


def run_branch(
    sublayers: dict[str, Any], layer: nn.Module, number: int, x: Tensor, call: Mapping[str, Any]
) -> Tensor:
    """`A(N x)` (number 0) or `F(N' x)` (number 1) of one layer.

    Args:
        sublayers: What the layers of its model compute.
        layer: With its weights.
        number: Of the branch.
        x: `[windows, length, hidden]`, the residual stream.
        call: What the attention is called with, but for the hidden states.

    Returns:
        `[windows, length, hidden]` float32, whatever the layer computes in.
    """
    which, options = ("ffn", {}) if number else ("attention", call)
    x = x.to(next(layer.parameters()).dtype)
    return run_sublayer(layer, sublayers, which, x, **options).float()


class _Recorder(nn.Module):
    """In an attention's place: keeps what it was called with, and adds nothing."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def forward(self, hidden_states: Tensor, **call: Any) -> tuple[Tensor, None]:
        self._calls.append({"hidden_states": hidden_states, **call})
        return torch.zeros_like(hidden_states), None


class _Nothing(nn.Module):
    """In an FFN's place: adds nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)
