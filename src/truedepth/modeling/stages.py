"""Sub-layers of neighbouring decoder layers that read one state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

KINDS = ("attention", "ffn")


def place_of(sublayer: str) -> int:
    """The place of `A14` or `F14` in the order A0 F0 A1 F1 …; -1 if it is neither."""
    kind, layer = sublayer[:1], sublayer[1:]
    return 2 * int(layer) + (kind == "F") if kind in ("A", "F") and layer.isdecimal() else -1


@dataclass(frozen=True)
class LayerForm:
    """How the layers of a model compute, by names within a layer; `sublayers` in config.json."""

    attention: Sequence[str | None]
    """Names of the attention, the norm before it and the norm after it; None for a missing norm."""

    ffn: Sequence[str | None]
    """Names of the FFN, the norm before it and the norm after it."""

    parallel: bool
    """Whether attention and FFN read the same state."""

    multiplier: str | None
    """The layer's attribute by which attention's and the FFN's outputs are multiplied, if any."""

    writes: Sequence[Sequence[str]] = ((), ())
    """Names of the modules whose outputs add up to what attention, and what the FFN, gives."""

    def normed(self, layer: Any, kind: str, x: Tensor) -> Tensor:
        """What a sub-layer's module reads, from the residual stream; of the same shape."""
        norm = getattr(self, kind)[1]
        normed: Tensor = x if norm is None else layer.get_submodule(norm)(x)
        return normed

    def output(self, layer: Any, kind: str, normed: Tensor, *args: Any, **call: Any) -> Tensor:
        """What a sub-layer's module gives, `[batch, length, hidden]`.

        Args:
            layer: The decoder layer.
            kind: `attention` or `ffn`.
            normed: What it reads, `[batch, length, hidden]`.
            args: Positional arguments for the module: for attention, those that the layer gets.
            call: Keyword arguments for the module.
        """
        output = layer.get_submodule(getattr(self, kind)[0])(normed, *args, **call)
        whole: Tensor = output[0] if isinstance(output, tuple) else output
        return whole

    def added(self, layer: Any, kind: str, output: Tensor) -> Tensor:
        """What a sub-layer adds to the residual stream, from what its module gives."""
        norm = getattr(self, kind)[2]
        if norm is not None:
            output = layer.get_submodule(norm)(output)
        return output if self.multiplier is None else output * getattr(layer, self.multiplier)


def run_sublayer(
    layer: Any, form: LayerForm, kind: str, x: Tensor, *args: Any, **call: Any
) -> Tensor:
    """What a sub-layer adds to the residual stream x, `s(N_s x)`; see `LayerForm.output`."""
    normed = form.normed(layer, kind, x)
    return form.added(layer, kind, form.output(layer, kind, normed, *args, **call))


class Stage:
    """A stage of a loaded model, shared by the layers that have a sub-layer in it.

    Over several ranks every sub-layer gives a rank's part of its output, and the stage ends in one
    all-reduce: of the sum of the parts, or where norms follow, of the parts side by side.
    """

    def __init__(self, form: LayerForm) -> None:
        self._form = form
        self._members: list[tuple[Any, str]] = []
        self._writers: list[nn.Module] = []
        self._whole: list[tuple[Any, str]] = []
        self._sharded: list[nn.Module] | None = None

    def join(self, layer: Any, kind: str) -> None:
        """Make a sub-layer its next member."""
        self._members.append((layer, kind))

    @property
    def is_merged(self) -> bool:
        """Whether it has several members."""
        return len(self._members) > 1

    def give_parts(self) -> None:
        """Let the modules that write give their parts, if they are several."""
        if len(self._members) == 1 and len(self._written(*self._members[0])) < 2:
            return
        for layer, kind in self._members:
            writers = self._written(layer, kind)
            for writer in writers:
                own = type(writer)
                body = {"__module__": own.__module__}
                writer.__class__ = type(own.__name__, (PartOfSum, own), body)
                writer.stage = self
            self._writers += writers
            if not writers:
                self._whole.append((layer, kind))

    def _written(self, layer: Any, kind: str) -> list[Any]:
        """The modules whose outputs add up to what a member's module gives."""
        modules = dict(layer.named_modules())
        names = self._form.writes[KINDS.index(kind)]
        return [modules[name] for name in names if name in modules]

    @property
    def mesh(self) -> Any:
        """The ranks that share its sub-layers; None in one process."""
        if self._sharded is None:  # by the first run all weights are where they stay
            self._sharded = [writer for writer in self._writers if _mesh(writer)]
        return _mesh(self._sharded[0]) if self._sharded else None

    @property
    def _norms_follow(self) -> bool:
        return any(getattr(self._form, kind)[2] for _, kind in self._members)

    def run(
        self, parts: list[Tensor], layer: Any, kind: str, normed: Tensor, *args: Any, **call: Any
    ) -> list[Tensor]:
        """Run a member.

        Args:
            parts: What the members before it gave.
            layer: The member's layer.
            kind: `attention` or `ffn`.
            normed: The state that the stage reads, normed for it, `[batch, length, hidden]`.
            args: For attention, the positional arguments that the layer gets.
            call: For attention, its keyword arguments.

        Returns:
            What it gave too.
        """
        part = self._form.output(layer, kind, normed, *args, **call)
        if self.mesh is not None and any(each is layer and k == kind for each, k in self._whole):
            part = on_the_first(part, self.mesh)
        if self.mesh is not None and self._norms_follow:
            return [*parts, part]
        part = self._form.added(layer, kind, part)
        return [parts[0] + part] if parts else [part]

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, of the same shape."""
        if not part.requires_grad:
            torch.distributed.all_reduce(part, group=self.mesh.get_group())
            return part
        whole = DTensor.from_local(part, self.mesh, [Partial()])
        local: Tensor = whole.redistribute(self.mesh, [Replicate()]).to_local()
        return local

    def end(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        """The state behind it, from the state before it and what its members gave."""
        if self.mesh is None:
            return x + parts[0]
        if len(parts) == 1 and not self._norms_follow:
            return x + self.summed(parts[0])
        wholes = self.summed(torch.stack(parts))
        for (layer, kind), whole in zip(self._members, wholes, strict=True):
            x = x + self._form.added(layer, kind, whole)
        return x


class Staged:
    """Mixed into the layers that have a sub-layer in a stage of several:

        y = x + Σ_s s(N_s x)

    A layer at whose end a stage is open passes on x and what its members gave so far, `[1 + parts,
    batch, length, hidden]`.
    """

    continues = joined = leaves_open = False
    """Whether the attention is in the stage of the layer before, whether the FFN is in that of the
    attention, and whether the next layer's attention is in that of the FFN."""

    form: LayerForm
    stages: list[Stage]
    """Attention's and the FFN's."""

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From the stream, or x and parts, to the stream, or x and parts."""
        attention, ffn = self.stages
        x, *parts = hidden_states.unbind(0) if self.continues else [hidden_states]
        normed = self.form.normed(self, "attention", x)
        parts = attention.run(parts, self, "attention", normed, *args, **call)
        if not self.joined:
            x, parts = attention.end(x, parts), []
        if not self.joined or self.form.attention[1] != self.form.ffn[1]:
            normed = self.form.normed(self, "ffn", x)
        parts = ffn.run(parts, self, "ffn", normed)
        return torch.stack([x, *parts]) if self.leaves_open else ffn.end(x, parts)


class PartOfSum:
    """Mixed into a module that writes to the residual stream, in a stage of several.

    Under tensor parallelism transformers puts a function into the place of `forward` that ends in
    an all-reduce. That is left out here: the stage has one of its own. A module that every rank has
    whole gives its output on the first rank.
    """

    stage: Stage

    def _part(self, *inputs: Tensor) -> Tensor:
        mesh = self.stage.mesh
        if mesh is None:
            return super().forward(*inputs)  # type: ignore[misc, no-any-return]
        if _mesh(self) is None:
            return on_the_first(super().forward(*inputs), mesh)  # type: ignore[misc]
        if isinstance(self, nn.Linear):
            bias = _local(self.bias) if mesh.get_local_rank() == 0 else None  # once in the sum
            features = _split(inputs[0], self.in_features, mesh)
            return nn.functional.linear(features, _local(self.weight), bias)
        with _local_parameters(self):  # experts, their inputs and who gets them
            return super().forward(*(_shared(each, mesh) for each in inputs))  # type: ignore[misc, no-any-return]

    forward = property(lambda self: self._part, lambda self, replacement: None)


def _mesh(module: Any) -> Any:
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
def _local_parameters(module: Any) -> Iterator[None]:
    """A module that computes with its rank's shards."""
    own = dict(module._parameters)
    try:
        module._parameters.update({name: _local(parameter) for name, parameter in own.items()})
        yield
    finally:
        module._parameters.update(own)


def on_the_first(whole: Tensor, mesh: Any) -> Tensor:
    """What every rank has, as its part of a sum: 0 on all but the first, with its gradient."""
    return whole if mesh.get_local_rank() == 0 else whole - whole.detach()


def merge_stages(layers: Any, form: LayerForm, stages: Sequence[Sequence[str]]) -> None:
    """Let neighbouring sub-layers read one state, in place.

    Args:
        layers: A model's decoder layers.
        form: How they compute.
        stages: The names of the sub-layers in every stage of several, such as `A14` and `F14`.
    """
    held = {place: Stage(form) for place in range(2 * len(layers))}
    for stage in stages:
        first, *others = map(place_of, stage)
        held |= dict.fromkeys(others, held[first])
    merged = {place // 2 for stage in stages for place in map(place_of, stage)}
    for index in range(len(layers)):
        modules = dict(layers[index].named_modules())
        several = any(sum(name in modules for name in names) > 1 for names in form.writes)
        if index not in merged and not several:  # experts and shared experts are summed apart
            continue
        layer, places = layers[index], (2 * index, 2 * index + 1)
        mix_into(layer, Staged, form)
        layer.stages = [held[place] for place in places]
        for kind, stage in zip(KINDS, layer.stages, strict=True):
            stage.join(layer, kind)
        layer.continues = held[places[0]] is held.get(places[0] - 1)
        layer.joined = held[places[0]] is held[places[1]]
        layer.leaves_open = held[places[1]] is held.get(places[1] + 1)
    for each in dict.fromkeys(held.values()):
        each.give_parts()


def mix_into(layer: Any, behaviour: type, form: LayerForm) -> None:
    """Give a layer the forward of `Staged` or `SideBySide`, in place."""
    own = type(layer)
    layer.__class__ = type(own.__name__, (behaviour, own), {"__module__": own.__module__})
    layer.form = form


class SideBySide:
    """Mixed into the layers of a group that run on one input x:

        a = x + Σ A_i(N_i x)        y = a + Σ F_i(N'_i a)

    In `parallel` families the FFNs read x instead of a. Layers before the last pass on x and the
    sum a so far, `[2, batch, length, hidden]`; the last returns y.
    """

    is_first = is_last = False
    members: tuple[Any, ...] = ()
    form: LayerForm

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From x (the first layer) or x and a: x and a, or y (the last layer)."""
        x, a = (hidden_states, hidden_states) if self.is_first else hidden_states.unbind(0)
        a = a + run_sublayer(self, self.form, "attention", x, *args, **call)
        if not self.is_last:
            return torch.stack([x, a])
        y, entered = a, x if self.form.parallel else a
        for member in self.members:
            y = y + run_sublayer(member, self.form, "ffn", entered)
        return y
