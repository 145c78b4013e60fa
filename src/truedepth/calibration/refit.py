"""Closed-form repair: every linear map of a wide layer is refitted, without gradients.

Pairing is lossy because a layer no longer sees what its partner wrote. Wide layers are refitted one
after another. The calibration text is run through the group's original layers, starting from the
original's states, and through the wide layer, starting from the converted model's states so far.
Each map is then the ridge regression from what the wide layer has to what the original computed:

    maps that read    W_i ← W_i M_i,  M_i from x̂ to the normalised input that layer i saw
    attention output  W_o from the heads' outputs to what is missing to x + Σ_i A_i
    FFN output        W_d from the gated activations to what is missing to y

x, A_i and y (the input, the attentions and the output) are the original's. What earlier wide layers
left uncorrected is thus part of what is missing, and each sub-layer corrects as much as it can.

The architecture does not change. Memory holds the weights of one group, one map's sums over tokens,
and a few hidden states per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from truedepth.calibration.ridge import Fit, Regression
from truedepth.calibration.trajectories import Group, Walk
from truedepth.families.family import SublayerNames
from truedepth.runtime.calls import Calls
from truedepth.runtime.stage import KINDS, Kind, LoadedSublayer, Member, run_stage
from truedepth.widening.widen import packed_sizes

HOLD_OUT_EVERY = 8  # of every 8 windows one is held out, to choose the penalties on

Weights = dict[str, Tensor]
"""The weights of one layer by name within it, float32."""


@dataclass(frozen=True)
class Refit:
    """One wide layer, refitted."""

    weights: Weights
    fits: dict[str, Fit]
    """One fit per map that writes, such as `mlp.down_proj`, and one per member for the maps that
    read a norm, such as `mlp.gate_proj, mlp.up_proj of layer 15`."""


Note = Callable[[Kind, Tensor, Tensor], None]
"""Takes a sub-layer's kind, the state that it read, and what it added."""


def _noting(sublayer: LoadedSublayer, note: Note | None) -> Member[Calls]:
    """The sub-layer as a member of a stage; `note` is told what it read and added."""

    def member(x: Tensor, calls: Calls) -> Tensor:
        added = sublayer(x, calls)
        if note is not None:
            note(sublayer.kind, x, added)
        return added

    return member


class Calibrator:
    """Refits the wide layers of one conversion, first to last."""

    def __init__(self, walk: Walk) -> None:
        """Begin where a walk through the original and its conversion is."""
        self.walk, self._family = walk, walk.layout.source.family
        windows = sum(batch.stop - batch.start for batch, _ in walk.fitted)
        every = min(HOLD_OUT_EVERY, windows)
        self._held = torch.tensor([window % every == every - 1 for window in range(windows)])

    @torch.inference_mode()
    def refit(self, group: Group) -> Refit:
        """Refit the wide layer that stands for a group, and take both models past it.

        Args:
            group: The next layers of the original.

        Raises:
            TruedepthError: Activations are not finite or too few.
        """
        walk = self.walk
        walk.separate()
        (wide,) = walk.layers(group).values()
        seen, attended = self._pass_originals(wide, group)
        tensors = walk.layout.wide_layer(group, torch.float32)
        found = Refit({name: tensor.read().float() for name, tensor in tensors.items()}, {})
        states = walk.converted_states
        inputs = walk.copied(states) if walk.stack.parallel else states
        sublayers = [each for stage in walk.stack.stages({group[0]: wide}) for each in stage]
        for sublayer in sublayers:
            self._refit_reads(sublayer, group, seen.pop(sublayer.kind), inputs, found)
            wanted = attended if sublayer.kind == "attention" else walk.original_states
            self._refit_write(sublayer, inputs, wanted, found)
            for windows, calls in walk.batches:
                added = sublayer(walk.batch(inputs, windows), calls)
                states[windows] = walk.batch(states, windows) + added
        return found

    def _pass_originals(
        self, wide: nn.Module, group: Group
    ) -> tuple[dict[Kind, list[Tensor]], Tensor]:
        """Take the original past a group.

        Returns:
            For each kind of sub-layer, what the members' maps read before any gain; and
            `x + Σ_i A_i`. Both `[fitted windows, length, hidden]`.
        """
        walk = self.walk
        count = len(self._held)
        seen = {kind: [walk.allocate(count) for _ in group] for kind in KINDS}
        attended = walk.allocate(count)
        for windows, _ in walk.fitted:
            attended[windows] = walk.original_states[windows]

        def note(member: int, windows: slice, kind: Kind, x: Tensor, added: Tensor) -> None:
            seen[kind][member][windows] = self._normalised(wide, kind, x)
            if kind == "attention":
                attended[windows] += added.to(attended)

        for member, index in enumerate(group):
            stages = walk.stack.stages({index: walk.stack.layer(index)})
            for windows, calls in walk.batches:
                fitted = partial(note, member, windows) if windows.start < count else None
                state = walk.batch(walk.original_states, windows)
                for stage in stages:
                    state = run_stage(state, [_noting(each, fitted) for each in stage], calls)
                walk.original_states[windows] = state
        return seen, attended

    def refit_aside(self, group: Group) -> Tensor:
        """`Walk.detour` past the group refitted alone; the walk stays where it is."""
        aside = Calibrator(self.walk.aside())
        aside.refit(group)
        return aside.walk.converted_states[len(self._held) :].clone()

    def _refit_reads(
        self,
        sublayer: LoadedSublayer,
        group: Group,
        seen: Sequence[Tensor],
        inputs: Tensor,
        found: Refit,
    ) -> None:
        """The maps that read a norm: one map of their input for each member."""
        walk, stack = self.walk, self.walk.stack
        width = stack.hidden_size
        sums = [Regression(width, width, stack.device) for _ in group]
        for windows, _ in walk.fitted:
            x = self._normalised(sublayer.layer, sublayer.kind, walk.batch(inputs, windows))
            for read, regression in zip(seen, sums, strict=True):
                regression.add(x, walk.batch(read, windows), self._held[windows])
        fits = [regression.solve(torch.eye(width)) for regression in sums]
        inside = self._names(sublayer.kind).module
        names = [name for name in self._family.reads if name.startswith(f"{inside}.")]
        sizes = stack.config.to_dict()
        for name in names:
            weight = found.weights[f"{name}.weight"]
            maps = [
                member @ fit.weight
                for part in torch.split(
                    weight, packed_sizes(self._family, name, sizes, len(weight))
                )
                for member, fit in zip(part.chunk(len(group)), fits, strict=True)
            ]
            self._replace(sublayer.layer, f"{name}.weight", torch.cat(maps), found)
        for layer, fit in zip(group, fits, strict=True):
            found.fits[f"{', '.join(names)} of layer {layer}"] = fit

    def _refit_write(
        self, sublayer: LoadedSublayer, inputs: Tensor, wanted: Tensor, found: Refit
    ) -> None:
        """The map that writes a sub-layer's output, toward the states wanted after it."""
        walk, wide = self.walk, sublayer.layer
        name = self._family.writes[KINDS.index(sublayer.kind)]
        module = wide.get_submodule(name)
        bias = getattr(module, "bias", None)
        multiplier = getattr(wide, self._family.multiplier) if self._family.multiplier else 1.0
        prior = found.weights[f"{name}.weight"]
        regression = Regression(prior.shape[1], prior.shape[0], walk.stack.device)
        features: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        for windows, calls in walk.fitted:
            sublayer(walk.batch(inputs, windows), calls)
            current = walk.batch(walk.converted_states, windows)
            target = (walk.batch(wanted, windows) - current) / multiplier
            if bias is not None:
                target = target - bias
            regression.add(features.pop(), target, self._held[windows])
        hook.remove()
        fit = regression.solve(prior)
        self._replace(wide, f"{name}.weight", fit.weight, found)
        found.fits[name] = fit

    def _replace(self, wide: nn.Module, name: str, weight: Tensor, found: Refit) -> None:
        wide.get_parameter(name).copy_(weight)
        found.weights[name] = weight

    def _names(self, kind: Kind) -> SublayerNames:
        return self._family.sublayers[KINDS.index(kind)]

    def _normalised(self, wide: nn.Module, kind: Kind, x: Tensor) -> Tensor:
        """What the maps of a sub-layer read, before any gain: a wide layer's gains are ones."""
        norm = self._names(kind).norm
        if norm is None:
            return x
        normed: Tensor = copy.deepcopy(wide.get_submodule(norm)).float()(x)
        return normed
