"""A stage: sub-layers that read one state.

    y = x + Σ_s s(N_s x)

s is an attention or an FFN, N_s the norm before it. A layer is two stages, `[A] [F]`, and so is a
group of layers side by side, `[A A …] [F F …]`; where attention and FFN read the same state, either
is one, `[A … F …]`. This sum stands here and, for checkpoints that are loaded without this package,
in `modeling/stages.py`. So does the sum of a local stage, over ranks r that go on with what they
have written themselves:

    y = x + Σ_r p_r        p_r = Σ_s s^r(N_s (x + p_r so far))
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from truedepth.modeling import LayerForm, SimulatedRanks
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

    ranks: SimulatedRanks | None = None
    """The ranks of the local stage that it is in: it reads all their states, `[ranks * windows,
    length, hidden]`, and its output is all their parts."""

    def __call__(self, x: Tensor, calls: Calls) -> Tensor:
        """`s(N_s x)` float32, whatever the layer computes in."""
        return self.added(self.output(x, calls))

    def output(self, x: Tensor, calls: Calls) -> Tensor:
        """What its module gives, in the dtype that the layer computes in."""
        self.on_run(self, x)
        call = calls[self.index] if self.kind == "attention" else {}
        if self.ranks is not None:
            call = self.ranks.spread_call(call, len(x) // self.ranks.count)
        x = x.to(next(self.layer.parameters()).dtype)
        normed = self.form.normed(self.layer, self.kind, x)
        return self.form.output(self.layer, self.kind, normed, **call)

    def normalised(self, x: Tensor) -> Tensor:
        """What its module reads, behind its norm, from the state x; float32, of the same shape."""
        names = getattr(self.form, self.kind)
        if names[1] is None:
            return x
        norm = copy.deepcopy(self.layer.get_submodule(names[1]))
        normed: Tensor = norm.float()(x)
        return normed

    def summed(self, output: Tensor) -> Tensor:
        """Its output, in a local stage the sum of all ranks' parts: `[windows, length, hidden]`."""
        return output if self.ranks is None else self.ranks.summed(output)

    @property
    def is_mixture(self) -> bool:
        """Whether its module has experts."""
        name = getattr(self.form, self.kind)[0]
        return any(each.ndim > 2 for each in self.layer.get_submodule(name).parameters())

    def added(self, output: Tensor) -> Tensor:
        """What it adds to the state, float32, from what its module gives."""
        return self.form.added(self.layer, self.kind, output).float()


Output = Callable[[LoadedSublayer, Tensor, Calls], Tensor]


def local_states(
    x: Tensor,
    members: Sequence[LoadedSublayer],
    calls: Calls,
    output: Output = LoadedSublayer.output,
) -> Iterator[tuple[LoadedSublayer, Tensor]]:
    """The members of a local stage, each with what its ranks read, `[ranks * windows, length,
    hidden]`.

    Args:
        x: The state before the stage, `[windows, length, hidden]`.
        members: Its sub-layers, in order.
        calls: How the model calls its attentions.
        output: Runs a member, when the next one is asked for.
    """
    ranks, before = members[0].ranks, None
    assert ranks is not None
    state = now = ranks.spread(x)
    for member in members:
        if not member.form.parallel or member.index != before:  # else both read one state
            state, before = now, member.index
        yield member, state
        part = output(member, state, calls)
        added = member.form.added_by_rank(member.layer, member.kind, part, ranks.count)
        now = now + added.float()


def run_local_stage(x: Tensor, members: Sequence[LoadedSublayer], calls: Calls) -> Tensor:
    """The state behind a local stage, `[windows, length, hidden]`; see `run_stage`."""
    parts: list[Tensor] = []

    def output(member: LoadedSublayer, state: Tensor, calls: Calls) -> Tensor:
        parts.append(member.output(state, calls))
        return parts[-1]

    deque(local_states(x, members, calls, output), maxlen=0)
    for member, part in zip(members, parts, strict=True):
        x = x + member.added(member.summed(part.float()))
    return x


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
