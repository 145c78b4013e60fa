"""A decoder whose layers come into memory one at a time.

Embedding, final norm and output head are loaded when they are used; layers are built where they are
asked for, from lazy tensors, and are gone with the last reference. The residual stream is float32,
whatever layers compute in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn

from truedepth import modeling
from truedepth.errors import TruedepthError
from truedepth.families.family import head_dim
from truedepth.plan.stages import KINDS, Sublayer
from truedepth.runtime import calls as recorded
from truedepth.runtime.calls import Calls
from truedepth.runtime.empty import empty_model
from truedepth.runtime.output_head import OutputHead
from truedepth.runtime.stage import LoadedSublayer, stages_of
from truedepth.sources.parameters import parameters_of
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor


class LayerStack:
    """The layers of an original, wide layers in their places, and what is around them."""

    def __init__(self, source: Source, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Build the model without its weights.

        Args:
            source: The model, of a supported family.
            device: Where layers compute.
            dtype: The dtype that they compute in.

        Raises:
            TruedepthError: The weights are quantized.
        """
        source.check_plain("which truedepth does not compute with")
        self._source, self._family = source, source.family
        self.device, self._dtype = torch.device(device), dtype
        self._model: Any = empty_model(source.config, source.path, dtype)
        for name, buffer in self._model.named_buffers():
            set_module_tensor_to_device(self._model, name, self.device, buffer, clear_cache=False)
        # A wide layer's does not follow from its number of heads.
        self.config.head_dim = head_dim(self.config.to_dict())
        self._form = modeling.LayerForm(
            **self._family.layer_form(self.config), writes=self._family.parts_of_sums
        )
        self._head = OutputHead(self._model)
        self._tensors = parameters_of(self._model, source.tensors)
        self._evaluated = 0

    @cached_property
    def _whole(self) -> Any:
        """The model with what is outside the layers."""
        tensors = self._tensors
        for name in [name for name, _ in self._model.named_parameters()]:
            if self._family.split(name)[0] is None and name in tensors:
                self._put(self._model, name, tensors[name])
        self._model.tie_weights()
        return self._model

    @cached_property
    def _size(self) -> int:
        """Elements of all layers."""
        return sum(
            math.prod(tensor.shape)
            for name, tensor in self._tensors.items()
            if self._family.split(name)[0] is not None
        )

    @property
    def token_passes(self) -> float:
        """Tokens that went through layers so far, in passes through all of the original's layers.

        A wide layer counts as its members do.
        """
        return self._evaluated / self._size

    @property
    def hidden_size(self) -> int:
        """Elements of a hidden state."""
        size: int = self.config.hidden_size
        return size

    @property
    def config(self) -> Any:
        """The model's config, an instance of transformers' class."""
        return self._model.config

    @property
    def parallel(self) -> bool:
        """Whether attention and FFN read the same state."""
        return self._form.parallel

    def layer(self, index: int) -> nn.Module:
        """A layer with its weights."""
        prefix, tensors = self._family.layer.format(index), self._tensors
        layer = copy.deepcopy(self._model.base_model.layers[index])
        names = [name for name, _ in layer.named_parameters()]
        return self._filled(layer, {name: tensors[prefix + name] for name in names})

    def sublayer(
        self,
        which: Sublayer,
        tensors: Mapping[str, LazyTensor] | None = None,
        ranks: int | None = None,
    ) -> LoadedSublayer:
        """An attention or an FFN with its norms; the rest of its layer stays without weights.

        Args:
            which: The original's.
            tensors: Weights by name within the layer, instead of the original's.
            ranks: The number of ranks of the local stage that it is in, if it is in one.
        """
        own = self.sublayer_tensors(which)
        layer = copy.deepcopy(self._model.base_model.layers[which.layer])
        layer = self._filled(layer, own | dict(tensors or {}), own)
        simulated = None
        if ranks is not None:
            simulated = modeling.SimulatedRanks(ranks, self.styles)
            modeling.give_parts(layer, self._form.writes[KINDS.index(which.kind)], simulated)
        return LoadedSublayer(which.kind, which.layer, layer, self._form, self._count, simulated)

    @property
    def styles(self) -> dict[str, str]:
        """How transformers shards a layer's maps over ranks, by name within the layer."""
        return modeling.styles_of(self.config)

    def sublayer_tensors(self, which: Sublayer) -> dict[str, LazyTensor]:
        """The original's weights of an attention or an FFN and its norms, by name in the layer."""
        prefix = self._family.layer.format(which.layer)
        layer = self._model.base_model.layers[which.layer]
        return {
            name: self._tensors[prefix + name]
            for name, _ in layer.named_parameters()
            if self._family.part_of(which.kind, name)
        }

    def wide_layer(self, group: tuple[int, ...], tensors: Mapping[str, LazyTensor]) -> nn.Module:
        """The wide layer that stands for a group, with these weights.

        Args:
            group: Consecutive layers of the original.
            tensors: The layer's weights by name within it.

        Raises:
            TruedepthError: A weight is missing, or is not one of the layer's.
        """
        first = self._model.base_model.layers[group[0]]
        with init_empty_weights(include_buffers=False):
            layer = modeling.wide_layer(first, self.config, len(group), group[0])
        return self._filled(layer.eval(), tensors)

    def _filled(
        self,
        layer: nn.Module,
        tensors: Mapping[str, LazyTensor],
        names: Iterable[str] | None = None,
    ) -> nn.Module:
        """A layer with weights: all of its parameters, or those of these names."""
        expected = [name for name, _ in layer.named_parameters()] if names is None else names
        if odd := set(expected) ^ tensors.keys():
            raise TruedepthError(
                f"The weights of a layer of {self._source.path} do not fit it: {min(odd)!r} is"
                f" {'unknown' if min(odd) in tensors else 'missing'}.",
                1,
            )
        for name, tensor in tensors.items():
            self._put(layer, name, tensor)
        return layer

    def _put(self, module: nn.Module, name: str, tensor: LazyTensor) -> None:
        set_module_tensor_to_device(
            module, name, self.device, tensor.read(), dtype=self._dtype, clear_cache=False
        )

    def stages(self, layers: Mapping[int, nn.Module]) -> list[list[LoadedSublayer]]:
        """The stages of layers side by side, by the original layer whose call each takes."""
        return stages_of(layers, self._form, self._count)

    def _count(self, sublayer: LoadedSublayer, x: Tensor) -> None:
        body = sublayer.layer.get_submodule(getattr(self._family, sublayer.kind).module)
        size = sum(parameter.numel() for parameter in body.parameters())
        self._evaluated += size * x.shape[0] * x.shape[1]

    def start(self, ids: Tensor) -> tuple[Tensor, Calls]:
        """What enters the first layer, and how every layer is called.

        Args:
            ids: `[windows, length]` int64.

        Returns:
            `[windows, length, hidden]` float32, and one call per layer.
        """
        return recorded.record(self._whole, self._family, ids.to(self.device))

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits `[positions, vocabulary]` from the last layer's output `[positions, hidden]`."""
        norm = self._whole.get_submodule(self._family.outside[1])
        return self._head(norm(x.to(self.device, self._dtype)))
