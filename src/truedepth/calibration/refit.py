"""Closed-form repair: every linear map of a merged segment is refitted, without gradients.

Merging is lossy because a sub-layer no longer sees what others of its stage write. Stages are
refitted one after another. The calibration text is run through the converted model so far, then
through the stage, and through the original's sub-layers that it stands for. Each map is the ridge
regression from what the stage has to what those computed:

    maps that read    W_s ← W_s M_s,  M_s from the sub-layer's input to the one that it had there
    maps that write   all of the stage at once, from their joined inputs (the heads' outputs, the
                      gated activations) to what is missing to the state behind those

The original's sub-layers start from the converted model's states, so a stage repairs what it loses
itself. In plans of layer groups alone they start from the original's own states, so that it also
corrects what earlier ones lost; that is worse where they lost much (docs/calibration.md).

A wide layer is two stages. What is missing behind its attentions is missing to x + Σ_i A_i, behind
its FFNs to y; x, A_i and y (the input, the attentions and the output) are those sub-layers'.

In a local stage, what a sub-layer reads differs from rank to rank. The columns of its FFNs go first
to the ranks that need them most (`columns`). The rows of its maps belong to ranks, and each rank's
rows are refitted for what that rank reads.

Where norms follow attention and FFN, what a stage adds is not linear in what its maps write. There
each map that writes is refitted alone, toward what the original's sub-layer gives to its norm.

Inputs are what maps read, behind their norm and its gain; a wide layer's gains are ones. Norms and
the architecture do not change. Memory holds the weights of one segment, the sums over tokens of
the maps that are solved together, and a few hidden states per token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import torch
from torch import Tensor, nn

from truedepth.calibration.columns import arrange
from truedepth.calibration.ridge import Fit, Regression
from truedepth.calibration.trajectories import Walk
from truedepth.calibration.writers import Writer
from truedepth.families.family import SublayerNames
from truedepth.plan.stages import KINDS, LocalStage, Segment, Sublayer, group_of, sublayers_of
from truedepth.runtime.calls import Calls
from truedepth.runtime.stage import (
    LoadedSublayer,
    Member,
    local_states,
    run_local_stage,
    run_stage,
)
from truedepth.widening.widen import packed_sizes

HOLD_OUT_EVERY = 8  # of every 8 windows one is held out, to choose the penalties on


@dataclass(frozen=True)
class Refit:
    """One segment, refitted."""

    weights: dict[str, Tensor]
    """Float32, by name in the original; those of a wide layer by the names of its first member."""

    fits: dict[str, Fit]
    """By the maps that were fitted together: for a wide layer those that write, such as
    `mlp.down_proj`, and those of each member that read a norm, such as `mlp.gate_proj, mlp.up_proj
    of layer 15`; for any other stage likewise, all that write as one."""

    priors: dict[str, Tensor] = field(init=False)
    """The weights before, which the fits are penalized for leaving."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "priors", dict(self.weights))


Pair = tuple[Tensor, Tensor]
"""What maps read, and what they should: `[windows, length, hidden]`."""

Written = tuple[list[Tensor], Tensor | float]
"""What the map that writes reads, and the rest of the sub-layer's output; see `Writer`."""

Run = Callable[[Sequence[Writer], slice, Calls], list[Written]]
"""Runs the sub-layers of writers on some windows."""

Note = Callable[[LoadedSublayer, Tensor, Tensor, Tensor], None]
"""Takes a sub-layer, the state that it read, what its module gave and what it added."""


@dataclass(frozen=True)
class _Passed:
    """What was noted of the original's sub-layers; all `[fitted windows, length, hidden]`."""

    seen: dict[Sublayer, Tensor]
    """What the maps of each read, by the norm of what each becomes."""

    gave: dict[Sublayer, Tensor]
    """What each gave to the norm behind it; empty if there is none."""

    attended: Tensor
    """`x + Σ_i A_i` of a group."""


def _noting(sublayer: LoadedSublayer, note: Note | None) -> Member[Calls]:
    """The sub-layer as a member of a stage; `note` is told what it read and added."""

    def member(x: Tensor, calls: Calls) -> Tensor:
        output = sublayer.output(x, calls)
        added = sublayer.added(output)
        if note is not None:
            note(sublayer, x, output, added)
        return added

    return member


class Calibrator:
    """Refits the merged segments of one conversion, first to last."""

    def __init__(self, walk: Walk) -> None:
        """Begin where a walk through the original and its conversion is."""
        self.walk, self._family = walk, walk.layout.source.family
        self._norms_follow = any(names.post_norm for names in self._family.sublayers)
        windows = sum(batch.stop - batch.start for batch, _ in walk.fitted)
        every = min(HOLD_OUT_EVERY, windows)
        self._held = torch.tensor([window % every == every - 1 for window in range(windows)])

    @torch.inference_mode()
    def refit(self, segment: Segment) -> Refit:
        """Refit what a segment becomes, and take both models past it.

        Args:
            segment: The next of the converted model: a group that becomes a wide layer, or a stage.

        Raises:
            TruedepthError: Activations are not finite or too few.
        """
        walk = self.walk
        walk.separate()
        if walk.restarts:
            walk.restart()
        weights = walk.weights(segment)
        stages = walk.loaded(segment, weights)
        passed = self._pass_originals(segment, [each for stage in stages for each in stage])
        if isinstance(segment[0], LocalStage):
            arrange(walk, segment[0], weights, passed.seen)
            stages = walk.loaded(segment, weights)
        found = Refit(weights, {})
        states, group = walk.converted_states, group_of(segment)
        for stage in stages:
            if stage[0].ranks is not None:
                self._refit_local(stage, passed, found)
                continue
            # The halves of a wide layer are refitted one after the other, even if they read one
            # state; the sub-layers of any other stage together.
            steps = [[each] for each in stage] if group else [stage]
            inputs = walk.copied(states) if len(steps) > 1 else states
            for step in steps:
                for sublayer in step:
                    layers = group or (sublayer.index,)
                    read = [passed.seen.pop(Sublayer(layer, sublayer.kind)) for layer in layers]
                    pairs = partial(self._pairs, sublayer, inputs, read)
                    said = [f"of layer {layer}" for layer in layers]
                    self._refit_reads(sublayer, pairs, said, found)
                run = partial(self._written, inputs)
                if self._norms_follow:
                    for each in step:
                        gave = passed.gave.pop(Sublayer(each.index, each.kind))
                        self._refit_writes([each], run, partial(walk.batch, gave), found)
                else:
                    before_ffns = group and step[0].kind == "attention"
                    wanted = passed.attended if before_ffns else walk.original_states
                    target = partial(self._missing, wanted, step[0].layer)
                    self._refit_writes(step, run, target, found)
                for windows, calls in walk.batches:
                    x, y = walk.batch(inputs, windows), walk.batch(states, windows)
                    for sublayer in step:
                        y = y + sublayer(x, calls)
                    states[windows] = y
        return found

    def refit_aside(self, segment: Segment) -> Tensor:
        """`Walk.detour` behind the segment refitted alone; the walk stays where it is."""
        aside = Calibrator(self.walk.aside())
        aside.refit(segment)
        return aside.walk.converted_states[len(self._held) :].clone()

    def _pass_originals(self, segment: Segment, sublayers: Sequence[LoadedSublayer]) -> _Passed:
        """Take the original past a segment that becomes these sub-layers."""
        walk = self.walk
        count, group = len(self._held), group_of(segment)
        seen = {each: walk.allocate(count) for each in sublayers_of(segment)}
        gave = {each: walk.allocate(count) for each in seen if self._norms_follow}
        attended = walk.allocate(count if group else 0)
        for windows, _ in walk.fitted if group else ():
            attended[windows] = walk.original_states[windows]
        becomes = {
            Sublayer(layer, each.kind): each
            for each in sublayers
            for layer in group or (each.index,)
        }

        def note(
            windows: slice, own: LoadedSublayer, x: Tensor, output: Tensor, added: Tensor
        ) -> None:
            which = Sublayer(own.index, own.kind)
            seen[which][windows] = becomes[which].normalised(x)
            if self._norms_follow:
                gave[which][windows] = output.to(gave[which])
            if group and own.kind == "attention":
                attended[windows] += added.to(attended)

        for stages in walk.originals(segment):
            for windows, calls in walk.batches:
                fitted = partial(note, windows) if windows.start < count else None
                state = walk.batch(walk.original_states, windows)
                for stage in stages:
                    state = run_stage(state, [_noting(each, fitted) for each in stage], calls)
                walk.original_states[windows] = state
        return _Passed(seen, gave, attended)

    def _refit_local(
        self, members: Sequence[LoadedSublayer], passed: _Passed, found: Refit
    ) -> None:
        """The maps of a local stage: those that read for each rank, by the rows that it has."""
        walk = self.walk
        for count, member in enumerate(members[1:], 2):  # the first reads what the original did
            seen = passed.seen[Sublayer(member.index, member.kind)]
            pairs = partial(self._pairs_by_rank, members[:count], seen)
            assert member.ranks is not None
            said = [f"of layer {member.index}, rank {rank}" for rank in range(member.ranks.count)]
            if member.kind == "attention" and getattr(walk.stack.config, "kv_lora_rank", None):
                said = [f"of layer {member.index}"]  # latents have no rows of a rank's own
            self._refit_reads(member, pairs, said, found)
        run = partial(self._written_by_ranks, members)
        if self._norms_follow:
            for each in members:
                gave = passed.gave[Sublayer(each.index, each.kind)]
                self._refit_writes([each], run, partial(walk.batch, gave), found)
        else:
            target = partial(self._missing, walk.original_states, members[0].layer)
            self._refit_writes(members, run, target, found)
        for windows, calls in walk.batches:
            x = walk.batch(walk.converted_states, windows)
            walk.converted_states[windows] = run_local_stage(x, members, calls)

    def _written(
        self, inputs: Tensor, writers: Sequence[Writer], windows: slice, calls: Calls
    ) -> list[Written]:
        """What sub-layers that read one state write."""
        return [writer.run(self.walk.batch(inputs, windows), calls)[:2] for writer in writers]

    def _written_by_ranks(
        self,
        members: Sequence[LoadedSublayer],
        writers: Sequence[Writer],
        windows: slice,
        calls: Calls,
    ) -> list[Written]:
        """What some members of a local stage write, on all ranks."""
        found: list[Written] = []
        own = {(writer.sublayer.index, writer.sublayer.kind): writer for writer in writers}

        def output(member: LoadedSublayer, state: Tensor, calls: Calls) -> Tensor:
            if (writer := own.get((member.index, member.kind))) is None:
                return member.output(state, calls)
            reads, rest, gave = writer.run(state, calls)
            found.append((reads, rest))
            return gave

        x = self.walk.batch(self.walk.converted_states, windows)
        deque(local_states(x, members, calls, output), maxlen=0)
        return found

    def _pairs(
        self,
        sublayer: LoadedSublayer,
        inputs: Tensor,
        seen: Sequence[Tensor],
        windows: slice,
        calls: Calls,
    ) -> list[Pair]:
        """What a sub-layer reads, with what each member of its group read in the original."""
        x = sublayer.normalised(self.walk.batch(inputs, windows))
        return [(x, self.walk.batch(each, windows)) for each in seen]

    def _pairs_by_rank(
        self, members: Sequence[LoadedSublayer], seen: Tensor, windows: slice, calls: Calls
    ) -> list[Pair]:
        """What each rank reads in the last of these members, with what it read in the original."""
        x = self.walk.batch(self.walk.converted_states, windows)
        *_, (last, state) = local_states(x, members, calls)
        wanted = self.walk.batch(seen, windows)
        read = torch.split(last.normalised(state), len(wanted))
        return [(each, wanted) for each in read]

    def _refit_reads(
        self,
        sublayer: LoadedSublayer,
        pairs: Callable[[slice, Calls], list[Pair]],
        said: Sequence[str],
        found: Refit,
    ) -> None:
        """The maps that read a norm: one map of their input for each share of their rows.

        Args:
            sublayer: Whose maps.
            pairs: For some windows, what each share of the rows reads and what it should.
            said: What the fits are called, as the end of a name; a single one is of all pairs.
            found: Takes the weights and fits.
        """
        walk, stack = self.walk, self.walk.stack
        width = stack.hidden_size
        if not (names := self._maps(sublayer, self._family.reads)):
            return
        sums = [Regression([width], width, stack.device) for _ in said]
        for windows, calls in walk.fitted:
            for (x, z), regression in zip(pairs(windows, calls), cycle(sums), strict=False):
                regression.add(x, z, self._held[windows])
        fits = [regression.solve(torch.eye(width)) for regression in sums]
        sizes = stack.config.to_dict()
        for name in names:
            weight = found.priors[self._named(sublayer, name)]
            maps = [
                member @ fit.weight
                for part in torch.split(
                    weight, packed_sizes(self._family, name, sizes, len(weight))
                )
                for member, fit in zip(part.chunk(len(said)), fits, strict=True)
            ]
            self._replace(sublayer, name, torch.cat(maps), found)
        for end, fit in zip(said, fits, strict=True):
            found.fits[f"{', '.join(names)} {end}"] = fit

    def _missing(self, wanted: Tensor, layer: nn.Module, windows: slice) -> Tensor:
        """What the maps that write should sum up to, for the states that are wanted."""
        walk = self.walk
        missing = walk.batch(wanted, windows) - walk.batch(walk.converted_states, windows)
        return missing / getattr(layer, self._family.multiplier or "", 1.0)

    def _refit_writes(
        self,
        step: Sequence[LoadedSublayer],
        run: Run,
        target: Callable[[slice], Tensor],
        found: Refit,
    ) -> None:
        """The maps that write the outputs of sub-layers, together, toward a sum of them."""
        walk = self.walk
        writers = [Writer(each, self._maps(each, self._family.writes)) for each in step]
        fitted = [(each.sublayer, each.name) for each in writers if each.name]
        if not fitted:
            return
        priors = [found.priors[self._named(*each)] for each in fitted]
        columns = [prior.shape[1] for prior in priors]
        regression = Regression(columns, walk.stack.hidden_size, walk.stack.device)
        for windows, calls in walk.fitted:
            written = target(windows)
            features = []
            for reads, rest in run(writers, windows, calls):
                written = written - rest
                features += reads
            regression.add(torch.cat(features, -1), written, self._held[windows])
        fit = regression.solve(torch.cat(priors, 1))
        for (each, name), weight in zip(fitted, torch.split(fit.weight, columns, 1), strict=True):
            self._replace(each, name, weight.contiguous(), found)
        said = [f"{name} of layer {each.index}" for each, name in fitted]
        in_stage = len(step) > 1 or self._norms_follow
        found.fits[", ".join(said) if in_stage else fitted[0][1]] = fit

    def _replace(self, sublayer: LoadedSublayer, name: str, weight: Tensor, found: Refit) -> None:
        sublayer.layer.get_parameter(f"{name}.weight").copy_(weight)
        found.weights[self._named(sublayer, name)] = weight

    def _named(self, sublayer: LoadedSublayer, module: str) -> str:
        return f"{self._family.layer.format(sublayer.index)}{module}.weight"

    def _maps(self, sublayer: LoadedSublayer, names: Iterable[str]) -> list[str]:
        """Those of the maps that this sub-layer has."""
        held = {name for name, _ in sublayer.layer.named_modules()}
        inside = f"{self._names(sublayer).module}."
        return [name for name in names if name.startswith(inside) and name in held]

    def _names(self, sublayer: LoadedSublayer) -> SublayerNames:
        return self._family.sublayers[KINDS.index(sublayer.kind)]
