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
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.evaluate import Predictions, window_measures
from truedepth.families import Family
from truedepth.layer_stack import Calls, LayerStack
from truedepth.ridge import Fit, Regression

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

    def __init__(
        self,
        family: Family,
        originals: LayerStack,
        converted: LayerStack,
        ids: Tensor,
        *,
        measured: int = 0,
        activation_dtype: torch.dtype = torch.float32,
        workspace: Path | None = None,
        batch_size: int = 8,
    ) -> None:
        """Embed the calibration text.

        Args:
            family: Of both stacks.
            originals: The original's layers.
            converted: The converted model's, as `convert` writes them without calibration.
            ids: `[windows, length]` int64.
            measured: So many of the last windows are run along and nothing is fitted to them.
            activation_dtype: Of the states that are kept for every token.
            workspace: A directory for memory-mapped states; by default they are in memory.
            batch_size: Windows a forward pass.
        """
        self._family, self._originals, self._converted = family, originals, converted
        self._activation_dtype, self._workspace = activation_dtype, workspace
        fitted = len(ids) - measured
        self._fitted = _batches(0, fitted, batch_size)
        self._measured = _batches(fitted, len(ids), batch_size)
        every = min(HOLD_OUT, fitted)
        self._held = torch.tensor([window % every == every - 1 for window in range(fitted)])
        self._ids, self._calls = ids, list[Calls]()
        self._shape = (*ids.shape, originals.hidden_size)

        self._original = self._states()
        """What enters the next original layer."""

        for batch in self._fitted + self._measured:
            self._original[batch], calls = originals.start(ids[batch])
            self._calls.append(calls)
        self._current = self._original
        """What enters the next layer of the converted model: the same until the first group."""

    @torch.inference_mode()
    def advance(
        self, index: int, group: Sequence[int], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take both models past layer `index` of the converted one.

        Args:
            index: In the converted model.
            group: The original layers that it stands for.
            weights: Those that it was given by an earlier `refit`.
        """
        layers = self._layers(group)
        alone = len(group) == 1 and self._current is self._original
        if not alone:
            self._separate()
            wide = self._converted.layer(index)
            wide.load_state_dict(dict(weights or {}), strict=False)
        for batch, calls in self._every():
            if not alone:
                self._run(wide, (0, 1), batch, calls[group[0]])
            self._original[batch] = self._through(layers, self._original[batch].float(), calls)

    @torch.inference_mode()
    def alone(self, index: int, group: Sequence[int], *, refitted: bool = True) -> Tensor:
        """What the measured windows are behind one group, all before it being the original.

        Args:
            index: Of the wide layer in the converted model.
            group: The original layers that it stands for, the next ones.
            refitted: Or as it is.

        Returns:
            `[measured windows, length, hidden]`. Both models stay where they are.
        """
        if refitted:
            other = copy.copy(self)
            other._original = other._current = self._original.clone()
            other.refit(index, group)
            return other._current[self._held.numel() :].clone()
        wide = self._converted.layer(index)
        states = self._original[self._held.numel() :].clone()
        self._measure(wide, self._converted, group[0], states)
        return states

    @torch.inference_mode()
    def onward(self, layer: int, states: Sequence[Tensor]) -> None:
        """Run states of the measured windows through an original layer, in place."""
        module = self._originals.layer(layer)
        for each in states:
            self._measure(module, self._originals, layer, each)

    def _measure(self, module: nn.Module, stack: LayerStack, layer: int, states: Tensor) -> None:
        first = self._held.numel()
        for batch, calls in zip(self._measured, self._calls[len(self._fitted) :], strict=True):
            rows = slice(batch.start - first, batch.stop - first)
            x = states[rows].float()
            for branch in (0, 1):
                x = x + stack.branch(module, branch, x, calls[layer])
            states[rows] = x

    @property
    def token_passes(self) -> float:
        """Tokens run through either model, in passes through all of the original's layers."""
        return self._originals.token_passes + self._converted.token_passes

    @torch.inference_mode()
    def losses(self, states: Sequence[Tensor] = ()) -> Tensor:
        """How far the measured windows are from the original, when it is past its last layer.

        Args:
            states: Outputs of the last layer; by default the converted model's.

        Returns:
            `[states, measured windows, 4]` float64, as `window_measures` gives them.
        """
        first = self._held.numel()
        each = states or [self._current[first:]]
        rows = []
        for window, ids in enumerate(self._ids[first:]):
            models = [self._predictions(state[window, :-1]) for state in each]
            original = self._predictions(self._original[first + window, :-1])
            rows.append(window_measures(ids[1:], models, original))
        return torch.stack(rows, 1)

    def _predictions(self, states: Tensor) -> Predictions:
        return lambda positions: self._originals.logits(states[positions])

    def _every(self) -> Iterator[tuple[slice, Calls]]:
        """All batches and how their layers are called."""
        return zip(self._fitted + self._measured, self._calls, strict=True)

    def _run(
        self, wide: nn.Module, branches: Sequence[int], batch: slice, call: Mapping[str, Any]
    ) -> None:
        """Take a batch of the converted model past some branches of a layer."""
        x = self._current[batch].float()
        for branch in branches:
            x = x + self._converted.branch(wide, branch, x, call)
        self._current[batch] = x

    def _through(self, layers: Mapping[int, nn.Module], x: Tensor, calls: Calls) -> Tensor:
        for original, layer in layers.items():
            for branch in (0, 1):
                x = x + self._originals.branch(layer, branch, x, calls[original])
        return x

    @torch.inference_mode()
    def refit(self, index: int, group: Sequence[int]) -> Refit:
        """Refit layer `index` of the converted model, and take both models past it.

        Args:
            index: In the converted model.
            group: The original layers that it stands for.

        Raises:
            TruedepthError: Activations are not finite or too few.
        """
        self._separate()
        wide = self._converted.layer(index)
        seen = [[self._states() for _ in group] for _ in self._family.branches]
        attended = self._states()  # x + Σ_i A_i
        layers = self._layers(group)
        for batch, calls in self._every():
            attended[batch] = x = self._original[batch].float()
            for member, (original, layer) in enumerate(layers.items()):
                for branch in (0, 1):
                    seen[branch][member][batch] = self._normalised(wide, branch, x)
                    added = self._originals.branch(layer, branch, x, calls[original])
                    if branch == 0:
                        attended[batch] += added
                    x = x + added
            self._original[batch] = x
        found = Refit(self._converted.weights(index), {})
        for branch in (0, 1):
            self._refit_reads(wide, branch, group, seen[branch], found)
            seen[branch].clear()
            self._refit_write(wide, branch, group, attended, found)
            for batch, calls in self._every():
                self._run(wide, (branch,), batch, calls[group[0]])
        return found

    def _refit_reads(
        self,
        wide: nn.Module,
        branch: int,
        group: Sequence[int],
        seen: Sequence[Tensor],
        found: Refit,
    ) -> None:
        """The maps behind a norm, each member's by one map of their input."""
        width = self._shape[-1]
        sums = [Regression(width, width) for _ in group]
        for batch in self._fitted:
            x = self._normalised(wide, branch, self._current[batch].float())
            for member, regression in enumerate(sums):
                regression.add(x, seen[member][batch], self._held[batch])
        fits = [regression.solve(torch.eye(width)) for regression in sums]
        norm = self._family.branches[branch][0]
        names = [name for name, before in self._family.reads.items() if before == norm]
        for name in names:
            rows = found.weights[f"{name}.weight"].chunk(len(group))
            maps = [member @ fit.weight for member, fit in zip(rows, fits, strict=True)]
            self._replace(wide, f"{name}.weight", torch.cat(maps), found)
        for layer, fit in zip(group, fits, strict=True):
            found.fits[f"{', '.join(names)} of layer {layer}"] = fit

    def _refit_write(
        self, wide: nn.Module, branch: int, group: Sequence[int], attended: Tensor, found: Refit
    ) -> None:
        """The map that writes a branch's output."""
        name = self._family.writes[branch]
        module = wide.get_submodule(name)
        bias = found.weights.get(f"{name}.bias")
        prior = found.weights[f"{name}.weight"]
        regression = Regression(prior.shape[1], prior.shape[0])
        features: list[Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        for batch, calls in zip(self._fitted, self._calls, strict=False):
            x = self._current[batch].float()
            self._converted.branch(wide, branch, x, calls[group[0]])
            target = (self._original if branch else attended)[batch].float() - x
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
        normed: Tensor = wide.get_submodule(self._family.branches[branch][0])(x)
        return normed

    def _layers(self, group: Sequence[int]) -> dict[int, nn.Module]:
        return {layer: self._originals.layer(layer) for layer in group}

    def _separate(self) -> None:
        """From the first group on the two models' states differ."""
        if self._current is self._original:
            self._current = self._states()
            self._current.copy_(self._original)

    def _states(self) -> Tensor:
        """One vector a token: `[windows, length, hidden]`, zeros."""
        if self._workspace is None:
            return torch.zeros(self._shape, dtype=self._activation_dtype)
        count = math.prod(self._shape)
        # Without a name, its space is given back however the process ends; taken in advance, a full
        # disk is an error here and not a crash at a later write.
        with tempfile.NamedTemporaryFile(dir=self._workspace) as file:
            os.posix_fallocate(file.fileno(), 0, count * self._activation_dtype.itemsize)
            mapped = torch.from_file(
                file.name, shared=True, size=count, dtype=self._activation_dtype
            )
        return mapped.view(self._shape)


def _batches(start: int, end: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, end)) for first in range(start, end, size)]
