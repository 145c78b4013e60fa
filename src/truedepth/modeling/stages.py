"""Sub-layers of neighbouring decoder layers that read one state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


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

    writes: Sequence[str] | None = None
    """Names of the linear maps of attention and FFN that write to the residual stream."""


class Staged:
    """Mixed into the layers that have a sub-layer in a stage of several:

        y = x + Σ_s s(N_s x)

    A layer at whose end a stage is open passes on x and the sum so far, `[2, batch, length,
    hidden]`. Over several ranks that is the sum of a rank's parts; the stage ends in an all-reduce.
    """

    continues = joined = leaves_open = False
    """Whether the attention is in the stage of the layer before, whether the FFN is in that of the
    attention, and whether the next layer's attention is in that of the FFN."""

    form: LayerForm

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        """From the stream, or x and a sum, to the stream, or x and a sum."""
        attention, ffn = self.form.writes or (None, None)
        x, so_far = hidden_states.unbind(0) if self.continues else (hidden_states, None)
        added = run_sublayer(self, self.form, "attention", x, *args, **call)
        added = added if so_far is None else so_far + added
        if self.joined:
            added = added + run_sublayer(self, self.form, "ffn", x)
        else:
            x = x + self._whole(added, attention)
            added = run_sublayer(self, self.form, "ffn", x)
        if self.leaves_open:
            return torch.stack([x, added])
        return x + self._whole(added, ffn)

    def _whole(self, added: Tensor, writer: str | None) -> Tensor:
        """The sum over all ranks of a stage that ends with this writing map."""
        module = None if writer is None else self.get_submodule(writer)  # type: ignore[attr-defined]
        return module.summed(added) if isinstance(module, PartOfSum) else added


class PartOfSum(nn.Linear):
    """A map that writes to the residual stream, in a stage of several.

    Under tensor parallelism transformers puts a function into the place of `forward` that ends in
    an all-reduce. That is left out here: the stage has one of its own, behind the sum.
    """

    def _part(self, features: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            if features.shape[-1] == self.in_features:  # whole, as behind maps that are packed
                features = DTensor.from_local(features, mesh, [Replicate()])
                features = features.redistribute(mesh, [Shard(-1)]).to_local()
            bias = bias.to_local() if isinstance(bias, DTensor) else bias
            weight, bias = weight.to_local(), bias if mesh.get_local_rank() == 0 else None
        return nn.functional.linear(features, weight, bias)

    forward = property(lambda self: self._part, lambda self, replacement: None)

    def summed(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, `[batch, length, hidden]`."""
        if not isinstance(self.weight, DTensor):
            return part
        mesh = self.weight.device_mesh
        if not part.requires_grad:
            torch.distributed.all_reduce(part, group=mesh.get_group())
            return part
        whole = DTensor.from_local(part, mesh, [Partial()]).redistribute(mesh, [Replicate()])
        return whole.to_local()


def merge_stage(layers: Any, form: LayerForm, places: Sequence[int]) -> None:
    """Let neighbouring sub-layers read one state, in place.

    Args:
        layers: A model's decoder layers.
        form: How they compute.
        places: The sub-layers' places in the order A0 F0 A1 F1 …
    """
    for place in places:
        layer = layers[place // 2]
        if not isinstance(layer, Staged):
            mix_into(layer, Staged, form)
        if form.writes:
            layer.get_submodule(form.writes[place % 2]).__class__ = PartOfSum
    for before in places[:-1]:
        if before % 2:
            layers[before // 2].leaves_open = layers[before // 2 + 1].continues = True
        else:
            layers[before // 2].joined = True


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


def run_sublayer(
    layer: Any, form: LayerForm, kind: str, x: Tensor, *args: Any, **call: Any
) -> Tensor:
    """What a sub-layer adds to the residual stream, `s(N_s x)`: `[batch, length, hidden]`.

    Args:
        layer: The decoder layer.
        form: Names the layer's modules, norms and multiplier.
        kind: `attention` or `ffn`.
        x: The residual stream, `[batch, length, hidden]`.
        args: Positional arguments for the module: for attention, those that the layer gets.
        call: Keyword arguments for the module.
    """
    module, norm, post_norm = getattr(form, kind)
    if norm is not None:
        x = layer.get_submodule(norm)(x)
    output = layer.get_submodule(module)(x, *args, **call)
    added: Tensor = output[0] if isinstance(output, tuple) else output
    if post_norm is not None:
        added = layer.get_submodule(post_norm)(added)
    return added if form.multiplier is None else added * getattr(layer, form.multiplier)
