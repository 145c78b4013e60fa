"""What each rank gives of a module that writes to the residual stream.

A map that writes is shared out by its inputs, experts by their inner features. A rank's part is
what its share of these gives, and a bias is in the first rank's part. The parts of all ranks add up
to what the module gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

GATHERED = ("colwise_gather_output", "colwise_rep")
"""transformers' styles of sharding a map whose outputs every rank then gets from all ranks."""

EXPERTS = {
    "packed_colwise": (-2, 2),
    "packed_rowwise": (-1, 2),
    "colwise": (-2, 1),
    "rowwise": (-1, 1),
}
"""transformers' styles of sharding experts' maps: along which dimension, and how many maps lie
there one after another."""


class Owner(Protocol):
    """What modules give their parts to: a stage."""

    is_local: bool
    """Whether the ranks' inputs differ."""

    @property
    def mesh(self) -> Any:
        """The ranks that share the modules; None if they give their whole outputs."""


class SimulatedRanks:
    """Tensor-parallel ranks in one process, side by side in the batch.

    Every module runs on the inputs of all ranks, with all of its weights. Those that write give
    each rank's part, so that what a rank computes beyond its share is not used.
    """

    is_local = True

    def __init__(self, count: int, styles: Mapping[str, str]) -> None:
        """Be so many ranks.

        Args:
            count: The number of ranks.
            styles: transformers' styles of sharding, by names of maps and parameters in a layer.
        """
        self.count, self._styles = count, styles

    @property
    def mesh(self) -> SimulatedRanks:
        """Itself, for modules that give it their parts."""
        return self

    def spread(self, x: Tensor) -> Tensor:
        """`[batch, …]` for every rank: `[ranks * batch, …]`."""
        return x.repeat(self.count, *[1] * (x.ndim - 1))

    def spread_call(self, call: Any, batch: int) -> Any:
        """The arguments of a module that is called for a batch, for every rank's."""
        if isinstance(call, Mapping):
            return {name: self.spread_call(value, batch) for name, value in call.items()}
        if isinstance(call, tuple):
            return tuple(self.spread_call(value, batch) for value in call)
        own = isinstance(call, Tensor) and call.ndim > 1 and len(call) == batch > 1
        return self.spread(call) if own else call

    def own(self, features: Tensor) -> Tensor:
        """`[batch, …, features]`, every rank's share of its own `[ranks * batch, …, features]`."""
        each = zip(features.chunk(self.count), range(self.count), strict=True)
        return torch.cat([f.chunk(self.count, -1)[rank] for f, rank in each], -1)

    def summed(self, part: Tensor) -> Tensor:
        """`[batch, …]`, the sum of all ranks' parts `[ranks * batch, …]`."""
        return part.view(self.count, -1, *part.shape[1:]).sum(0)

    def parts(
        self, module: Any, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        """What each rank gives of a module, in its output's shape, from all ranks' inputs."""
        if isinstance(module, nn.Linear):
            features = inputs[0].reshape(self.count, -1, module.in_features)
            shares = zip(
                features.chunk(self.count, -1), module.weight.chunk(self.count, -1), strict=True
            )
            parts = [nn.functional.linear(f[rank], w) for rank, (f, w) in enumerate(shares)]
            if module.bias is not None:
                parts[0] = parts[0] + module.bias
            return torch.stack(parts).reshape(*inputs[0].shape[:-1], module.out_features)
        parts = []
        for rank, given in enumerate(zip(*(x.chunk(self.count) for x in inputs), strict=True)):
            with _with_parameters(module, self._shards(module, rank)):
                parts.append(forward(*given))
        return torch.cat(parts)

    def _shards(self, module: Any, rank: int) -> dict[str, Any]:
        """A rank's shards of experts' parameters."""
        shards = {}
        for name, parameter in module._parameters.items():
            dim, packed = EXPERTS[self._styles[f"{module.place}.{name}"]]
            maps = parameter.unflatten(dim, (packed, -1))
            shards[name] = maps.chunk(self.count, dim)[rank].flatten(dim - 1, dim)
        return shards

    def why_not(self, module: Any, place: str) -> str:
        """Why a module that writes cannot be shared out, as the end of a sentence; "" if it can.

        Args:
            module: The module.
            place: Its name in its layer.
        """
        sizes = [module.in_features] if isinstance(module, nn.Linear) else []
        for name, parameter in module._parameters.items() if not sizes else ():
            style = self._styles.get(f"{place}.{name}")
            if style not in EXPERTS:
                return f"transformers does not shard {place}.{name}"
            dim, packed = EXPERTS[style]
            sizes.append(parameter.shape[dim] // packed)
        odd = next((size for size in sizes if size % self.count), None)
        return "" if odd is None else f"{place} reads {odd} features, which do not divide by them"


class PartOfSum:
    """Mixed into a module that writes to the residual stream, in a stage of several.

    Under tensor parallelism transformers puts a function into the place of `forward` that ends in
    an all-reduce. That is left out here: the stage has one of its own. A module that every rank has
    whole gives its output on the first rank, or in a local stage, where the ranks' inputs differ,
    what a rank's share of its inputs gives.
    """

    stage: Owner
    place: str
    """Its name in its layer."""

    def _part(self, *inputs: Tensor) -> Tensor:
        mesh = self.stage.mesh
        if mesh is None:
            return super().forward(*inputs)  # type: ignore[misc, no-any-return]
        if isinstance(mesh, SimulatedRanks):
            return mesh.parts(self, super().forward, inputs)  # type: ignore[misc]
        is_whole, is_linear = mesh_of(self) is None, isinstance(self, nn.Linear)
        if is_whole and not (is_linear and self.stage.is_local):
            return on_the_first(super().forward(*inputs), mesh)  # type: ignore[misc]
        if isinstance(self, nn.Linear):
            bias = _local(self.bias) if mesh.get_local_rank() == 0 else None  # once in the sum
            features, weight = _split(inputs[0], self.in_features, mesh), _local(self.weight)
            if is_whole:
                weight = weight.chunk(mesh.size(), -1)[mesh.get_local_rank()]
            return nn.functional.linear(features, weight, bias)
        local = {name: _local(each) for name, each in self._parameters.items()}  # type: ignore[attr-defined]
        with _with_parameters(self, local):  # experts, their inputs and who gets them
            return super().forward(*(_shared(each, mesh) for each in inputs))  # type: ignore[misc, no-any-return]

    forward = property(lambda self: self._part, lambda self, replacement: None)


class WholeOutput:
    """Mixed into a map whose outputs transformers gathers from all ranks, in a local stage.

    There every rank computes all of them from its own input, with all of the map's weights, which
    the ranks gather once.
    """

    _gathered: tuple[Tensor, Tensor | None] | None = None

    def _output(self, x: Tensor) -> Tensor:
        own: Any = self
        if not isinstance(own.weight, DTensor):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        gathered = self._gathered
        if gathered is None:
            whole = own.weight.full_tensor()
            gathered = whole, own.bias.full_tensor() if own.bias is not None else None
        if not torch.is_grad_enabled():
            self._gathered = gathered
        return nn.functional.linear(x, *gathered)

    forward = property(lambda self: self._output, lambda self, replacement: None)


def mix_in(module: nn.Module, behaviour: type) -> None:
    """Give a module the methods of a class before its own, in place."""
    own = type(module)
    module.__class__ = type(own.__name__, (behaviour, own), {"__module__": own.__module__})


def give_parts(layer: nn.Module, names: Iterable[str], owner: Owner) -> list[Any]:
    """Let modules of a layer give their parts to a stage, in place; returns those that exist."""
    modules = dict(layer.named_modules())
    found = [name for name in names if name in modules]
    for name in found:
        writer: Any = modules[name]
        mix_in(writer, PartOfSum)
        writer.stage, writer.place = owner, name
    return [modules[name] for name in found]


def mesh_of(module: Any) -> Any:
    """The ranks that share a module's parameters; None if this process has them whole."""
    for parameter in module.parameters(recurse=False):
        if isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements):
            return parameter.device_mesh
    return None


def _split(features: Tensor, size: int, mesh: Any) -> Tensor:
    """A rank's share of the inputs of a map of so many; they are whole behind packed maps."""
    if features.shape[-1] != size:
        return features
    whole = DTensor.from_local(features, mesh, [Replicate()])
    share: Tensor = whole.redistribute(mesh, [Shard(-1)]).to_local()
    return share


def _shared(given: Tensor, mesh: Any) -> Tensor:
    """An input that every rank has: its gradient is the sum of theirs."""
    if not given.requires_grad:
        return given
    whole = DTensor.from_local(given, mesh, [Replicate()])
    local: Tensor = whole.to_local(grad_placements=[Partial()])
    return local


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@contextmanager
def _with_parameters(module: Any, parameters: Mapping[str, Any]) -> Iterator[None]:
    """A module that computes with these parameters instead of its own."""
    own = dict(module._parameters)
    try:
        module._parameters.update(parameters)
        yield
    finally:
        module._parameters.update(own)


def on_the_first(whole: Tensor, mesh: Any) -> Tensor:
    """What every rank has, as its part of a sum: 0 on all but the first, with its gradient."""
    return whole if mesh.get_local_rank() == 0 else whole - whole.detach()
