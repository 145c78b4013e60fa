"""A stage: sub-layers that read one state.

    y = x + Σ_s s(N_s x)

s is an attention or an FFN, N_s the norm before it. A layer is two stages, `[A] [F]`, and so is a
group of layers side by side, `[A A …] [F F …]`; where attention and FFN read the same state, either
is one, `[A … F …]`. This sum stands here and, for checkpoints that are loaded without this package,
in `modeling/stages.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from truedepth.modeling import LayerForm
from truedepth.plan.stages import KINDS, Kind
from truedepth.runtime.calls import Calls

C = TypeVar("C")
Member = Callable[[Tensor, C], Tensor]
"""`s(N_s x)` from x `[windows, length, hidden]` and how the model calls its attentions."""


def run_stage(x: Tensor, members: Iterable[Member[C]], calls: C) -> Tensor:
    """The state behind a stage, `[windows, length, hidden]`.

    Args:
        x: The state that all members read, `[windows, length, hidden]`.
        members: What each adds to it.
        calls: Given to the members.
    """
    return sum((member(x, calls) for member in members), start=x)


@dataclass(frozen=True)
class LoadedSublayer:
    """A sub-layer with its weights, as a member of a stage."""

    kind: Kind
    index: int
    """Number of the original layer whose call the attention takes."""

    layer: nn.Module
    form: LayerForm
    on_run: Callable[[LoadedSublayer, Tensor], object] = lambda sublayer, x: None
    """Called before every run."""

    def __call__(self, x: Tensor, calls: Calls) -> Tensor:
        """`s(N_s x)` float32, whatever the layer computes in."""
        return self.added(self.output(x, calls))

    def output(self, x: Tensor, calls: Calls) -> Tensor:
        """What its module gives, in the dtype that the layer computes in."""
        self.on_run(self, x)
        call = calls[self.index] if self.kind == "attention" else {}
        x = x.to(next(self.layer.parameters()).dtype)
        normed = self.form.normed(self.layer, self.kind, x)
        return self.form.output(self.layer, self.kind, normed, **call)

    @property
    def is_mixture(self) -> bool:
        """Whether its module has experts."""
        name = getattr(self.form, self.kind)[0]
        return any(each.ndim > 2 for each in self.layer.get_submodule(name).parameters())

    def added(self, output: Tensor) -> Tensor:
        """What it adds to the state, float32, from what its module gives."""
        return self.form.added(self.layer, self.kind, output).float()


def stages_of(
    layers: Mapping[int, nn.Module],
    form: LayerForm,
    on_run: Callable[[LoadedSublayer, Tensor], object] = lambda sublayer, x: None,
) -> list[list[LoadedSublayer]]:
    """The stages of layers side by side.

    Args:
        layers: By the original layer whose call each takes.
        form: What they compute.
        on_run: Called before every run of a sub-layer.
    """
    stages = [
        [LoadedSublayer(kind, index, layer, form, on_run) for index, layer in layers.items()]
        for kind in KINDS
    ]
    return [stages[0] + stages[1]] if form.parallel else stages
