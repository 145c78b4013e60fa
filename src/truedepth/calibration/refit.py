"""Closed-form repair: every linear map of a wide layer is refitted, without gradients.

Pairing is lossy because a layer no longer sees what its partner wrote. Wide layer after wide layer,
the calibration text is run through the original layers, from what entered them in the original
model, and through the wide layer, from what the converted model gives it so far. Each map is then
the ridge regression of what the original computed on what the wide layer has:

    maps that read    W_i ← W_i M_i,  M_i from x̂ to the normalised input that layer i saw
    attention output  W_o from the heads' outputs to what is missing to x + Σ_i A_i
    FFN output        W_d from the gated activations to what is missing to y

x, A_i and y (the input, the attentions and the output) are the original's, so what earlier wide
layers left undone is part of what is missing, and each branch takes up what it can of it.

The architecture does not change. Memory holds the weights of one group, the sums over tokens of one
map, and for every token a few states.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from truedepth.calibration.ridge import Fit, Regression
from truedepth.calibration.trajectories import Walk
from truedepth.families.family import Family
from truedepth.widening.widen import packed_sizes

HOLD_OUT = 8  # one window in so many chooses the penalties

Weights = dict[str, Tensor]
"""Of one layer, by name within it, float32."""


@dataclass(frozen=True)
class Refit:
    """One wide layer, refitted."""

    weights: Weights
    fits: dict[str, Fit]
    """By map; of maps that read, one for each member: `mlp.gate_proj, mlp.up_proj of layer 15`."""


class Calibrator:
    """Refits the wide layers of one conversion, first to last."""

    def __init__(self, family: Family, walk: Walk) -> None:
        """Begin where a walk is.

        Args:
            family: Of both models.
            walk: Through the original and its conversion without calibration.
        """
        self._family, self.walk = family, walk
        windows = sum(batch.stop - batch.start for batch, _ in walk.fitted)
        every = min(HOLD_OUT, windows)
        self._held = torch.tensor([window % every == every - 1 for window in range(windows)])

    @torch.inference_mode()
    def refit(self, index: int, group: Sequence[int]) -> Refit:
        """Refit layer `index` of the converted model, and take both models past it.

        Args:
            index: In the converted model.
            group: The original layers that it stands for.

        Raises:
            TruedepthError: Activations are not finite or too few.
        """
        walk = self.walk
        walk.separate()
        (wide,) = walk.converted.layers(index)
        (place,) = walk.converted.places[index]
        windows = len(self._held)
        seen = [[walk.states(windows) for _ in group] for _ in self._family.sublayers]
        attended = walk.states(windows)  # x + Σ_i A_i
        for batch, _ in walk.fitted:
            attended[batch] = walk.original[batch]
        for member, original in enumerate(group):
            layer = walk.originals.layer(original)
            for batch, calls in walk.batches:
                x = y = walk.take(walk.original, batch)
                for branch in (0, 1):
                    entered = x if walk.originals.parallel else y
                    added = walk.originals.branch(layer, branch, entered, calls[original])
                    if batch.start < windows:
                        seen[branch][member][batch] = self._normalised(wide, branch, entered)
                        if branch == 0:
                            attended[batch] += added.to(attended)
                    y = y + added
                walk.original[batch] = y
        found = Refit(walk.converted.weights(place), {})
        inputs = walk.copied(walk.current) if walk.converted.parallel else walk.current
        for branch in (0, 1):
            self._refit_reads(wide, branch, group, seen[branch], inputs, found)
            seen[branch].clear()
            wanted = walk.original if branch else attended
            self._refit_write(wide, branch, group, inputs, wanted, found)
            for batch, calls in walk.batches:
                x = walk.take(inputs, batch)
                added = walk.converted.branch(wide, branch, x, calls[group[0]])
                walk.current[batch] = walk.take(walk.current, batch) + added
        return found

    def refit_aside(self, index: int, group: Sequence[int]) -> Tensor:
        """`Walk.detour` of the group refitted there by itself; the walk stays where it is."""
        aside = copy.copy(self)
        aside.walk = copy.copy(self.walk)
        aside.walk.original = self.walk.copied(self.walk.original)
        aside.walk.current = aside.walk.original
        aside.refit(index, group)
        return aside.walk.current[len(self._held) :].clone()

    def _refit_reads(
        self,
        wide: nn.Module,
        branch: int,
        group: Sequence[int],
        seen: Sequence[Tensor],
        inputs: Tensor,
        found: Refit,
    ) -> None:
        """The maps behind a norm, each member's by one map of their input."""
        walk = self.walk
        width, device = walk.originals.hidden_size, walk.originals.device
        sums = [Regression(width, width, device) for _ in group]
        for batch, _ in walk.fitted:
            x = self._normalised(wide, branch, walk.take(inputs, batch))
            for member, regression in enumerate(sums):
                regression.add(x, walk.take(seen[member], batch), self._held[batch])
        fits = [regression.solve(torch.eye(width)) for regression in sums]
        inside = self._family.sublayers[branch].module
        names = [name for name in self._family.reads if name.startswith(f"{inside}.")]
        sizes = walk.originals.config.to_dict()
        for name in names:
            weight = found.weights[f"{name}.weight"]
            maps = [
                member @ fit.weight
                for part in torch.split(
                    weight, packed_sizes(self._family, name, sizes, len(weight))
                )
                for member, fit in zip(part.chunk(len(group)), fits, strict=True)
            ]
            self._replace(wide, f"{name}.weight", torch.cat(maps), found)
        for layer, fit in zip(group, fits, strict=True):
            found.fits[f"{', '.join(names)} of layer {layer}"] = fit

    def _refit_write(
        self,
        wide: nn.Module,
        branch: int,
        group: Sequence[int],
        inputs: Tensor,
        wanted: Tensor,
        found: Refit,
    ) -> None:
        """The map that writes a branch's output, toward the states that are wanted behind it."""
        walk, name = self.walk, self._family.writes[branch]
        module = wide.get_submodule(name)
        bias = getattr(module, "bias", None)
        multiplier = getattr(wide, self._family.multiplier) if self._family.multiplier else 1.0
        prior = found.weights[f"{name}.weight"]
        regression = Regression(prior.shape[1], prior.shape[0], walk.originals.device)
        features: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        for batch, calls in walk.fitted:
            walk.converted.branch(wide, branch, walk.take(inputs, batch), calls[group[0]])
            target = (walk.take(wanted, batch) - walk.take(walk.current, batch)) / multiplier
            if bias is not None:
                target = target - bias
            regression.add(features.pop(), target, self._held[batch])
        hook.remove()
        fit = regression.solve(prior)
        self._replace(wide, f"{name}.weight", fit.weight, found)
        found.fits[name] = fit

    def _replace(self, wide: nn.Module, name: str, weight: Tensor, found: Refit) -> None:
        wide.get_parameter(name).copy_(weight)
        found.weights[name] = weight

    def _normalised(self, wide: nn.Module, branch: int, x: Tensor) -> Tensor:
        """What the maps of a branch read, before any gain: a wide layer's gains are ones."""
        norm = self._family.sublayers[branch].norm
        if norm is None:
            return x
        normed: Tensor = copy.deepcopy(wide.get_submodule(norm)).float()(x)
        return normed
