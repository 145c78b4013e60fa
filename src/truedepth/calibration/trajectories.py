"""An original and its conversion, walked through side by side, group after group.

For every token only the two states that enter the models' next layers are kept. Layers are loaded
from disk when they are needed and freed afterwards. Windows that maps are *fitted* to come first,
followed by windows that are only *measured*.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from truedepth.calibration.options import Calibration
from truedepth.calibration.windows import activation_dtype, placement
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import Predictions, window_measures
from truedepth.files.scratch import mapped
from truedepth.runtime.calls import Calls
from truedepth.runtime.layer_stack import LayerStack
from truedepth.runtime.stage import LoadedSublayer, run_stage
from truedepth.sources.source import Source
from truedepth.tensors import from_tensor
from truedepth.widening.layout import Layout

Batch = tuple[slice, Calls]
"""Some windows, and how every layer is called for them."""

Group = tuple[int, ...]
"""Consecutive layers of the original."""


class Walk:
    """Both models' states before the same original layer."""

    def __init__(
        self,
        stack: LayerStack,
        layout: Layout,
        ids: Tensor,
        *,
        measured: int = 0,
        activation_dtype: torch.dtype = torch.float32,
        workspace: Path | None = None,
        batch_size: int = 8,
    ) -> None:
        """Embed the text.

        Args:
            stack: The original's layers.
            layout: Says which groups become wide layers, and gives their weights.
            ids: `[windows, length]` int64.
            measured: How many of the windows, the last ones, are only measured.
            activation_dtype: Dtype of the states that are kept.
            workspace: A directory for memory-mapped states; by default they are in memory.
            batch_size: Windows per forward pass.
        """
        self.stack, self.layout = stack, layout
        self._activation_dtype, self._workspace = activation_dtype, workspace
        self._ids, self._first = ids, len(ids) - measured
        self.original_states = self.allocate(len(ids))
        """What enters the next layer of the original: `[windows, length, hidden]`."""

        self.fitted: list[Batch] = []
        self.measured: list[Batch] = []
        for batches, start, end in (
            (self.fitted, 0, self._first),
            (self.measured, self._first, len(ids)),
        ):
            for first in range(start, end, batch_size):
                windows = slice(first, min(first + batch_size, end))
                self.original_states[windows], calls = stack.start(ids[windows])
                batches.append((windows, calls))
        self.converted_states = self.original_states
        """What enters the converted model's next layer; the same tensor until the first group."""

    @property
    def batches(self) -> list[Batch]:
        """All windows."""
        return self.fitted + self.measured

    def allocate(self, windows: int) -> Tensor:
        """One vector per token: `[windows, length, hidden]`, zeros."""
        shape = (windows, self._ids.shape[1], self.stack.hidden_size)
        if self._workspace is None:
            return torch.zeros(shape, dtype=self._activation_dtype)
        try:
            return mapped(self._workspace, None, shape, self._activation_dtype)
        except OSError as error:
            size = math.prod(shape) * self._activation_dtype.itemsize
            raise TruedepthError(
                f"The workspace {self._workspace} cannot hold {size / 1e6:,.0f} MB more of states:"
                f" {error.strerror}.",
                exit_code=1,
            ) from error

    def batch(self, states: Tensor, windows: slice) -> Tensor:
        """Some windows' states on the device of the layers, in float32."""
        return states[windows].to(self.stack.device, torch.float32)

    def separate(self) -> None:
        """From the first group on the two models' states differ."""
        if self.converted_states is self.original_states:
            self.converted_states = self.copied(self.original_states)

    def copied(self, states: Tensor) -> Tensor:
        """A copy of states."""
        again = self.allocate(len(states))
        again.copy_(states)
        return again

    def aside(self) -> Walk:
        """A copy of the walk that goes on from here; this one stays where it is."""
        aside = copy.copy(self)
        aside.original_states = self.copied(self.original_states)
        aside.converted_states = aside.original_states
        return aside

    def layers(
        self, group: Group, weights: Mapping[str, Tensor] | None = None
    ) -> dict[int, nn.Module]:
        """The layers that a group becomes, by the original layer whose call each takes.

        Args:
            group: It becomes one wide layer, or keeps its members as they are.
            weights: The wide layer's weights by name within it; default: the converted ones.
        """
        if not self.layout.is_wide(group):
            return {layer: self.stack.layer(layer) for layer in group}
        tensors = self.layout.wide_layer(group, torch.float32)
        if weights is not None:
            tensors = {name: from_tensor(weight) for name, weight in weights.items()}
        return {group[0]: self.stack.wide_layer(group, tensors)}

    @torch.inference_mode()
    def advance(self, group: Group, weights: Mapping[str, Tensor] | None = None) -> None:
        """Take both models past a group, the original layer by layer.

        Args:
            group: The next layers of the original.
            weights: The wide layer's weights by name within it; default: the converted ones.
        """
        layers: dict[int, nn.Module] = {}
        if len(group) > 1 or self.converted_states is not self.original_states:
            self.separate()
            layers = self.layers(group, weights)
            self._run(layers, self.converted_states, self.batches)
        for layer in group:
            own = layers if len(group) == 1 and layers else {layer: self.stack.layer(layer)}
            self._run(own, self.original_states, self.batches)

    @torch.inference_mode()
    def detour(self, group: Group) -> Tensor:
        """The states of the measured windows after one group; all before it is the original.

        Args:
            group: The next layers of the original.

        Returns:
            `[measured windows, length, hidden]`. Both models stay where they are.
        """
        states = self.original_states[self._first :].clone()
        self._run(self.layers(group), states, self.measured, self._first)
        return states

    @torch.inference_mode()
    def onward(self, layer: int, states: Sequence[Tensor]) -> None:
        """Run states of the measured windows through an original layer, in place."""
        layers = {layer: self.stack.layer(layer)}
        for each in states:
            self._run(layers, each, self.measured, self._first)

    def _run(
        self,
        layers: Mapping[int, nn.Module],
        states: Tensor,
        batches: Sequence[Batch],
        first: int = 0,
    ) -> None:
        """Take windows' states past layers that run side by side, in place.

        Args:
            layers: By the original layer whose call each takes.
            states: States of the windows from `first` on.
            batches: The windows to run.
            first: Number of the window that `states` begin with.
        """
        stages: list[list[LoadedSublayer]] = self.stack.stages(layers)
        for windows, calls in batches:
            rows = slice(windows.start - first, windows.stop - first)
            x = self.batch(states, rows)
            for stage in stages:
                x = run_stage(x, stage, calls)
            states[rows] = x

    @torch.inference_mode()
    def losses(self, states: Sequence[Tensor] = ()) -> Tensor:
        """How far the measured windows are from the original, after its last layer.

        Args:
            states: Outputs of the last layer; by default the converted model's.

        Returns:
            `[states, measured windows, 4]` float64, as `window_measures` gives them.
        """
        each = states or [self.converted_states[self._first :]]
        rows = []
        for window, ids in enumerate(self._ids[self._first :]):
            models = [self._predictions(state[window, :-1]) for state in each]
            original = self._predictions(self.original_states[self._first + window, :-1])
            rows.append(window_measures(ids[1:], models, original))
        return torch.stack(rows, 1)

    def _predictions(self, states: Tensor) -> Predictions:
        return lambda positions: self.stack.logits(states[positions])


def layer_stack(source: Source, options: Calibration) -> LayerStack:
    """The layers of an original, on the device and in the dtype of the options."""
    device, dtype = placement(source, options)
    return LayerStack(source, device=device, dtype=dtype)


def walk_through(
    stack: LayerStack, layout: Layout, fitted: Tensor, measured: Tensor, options: Calibration
) -> Walk:
    """A walk at the start of the original and of its conversion.

    Args:
        stack: The original's layers.
        layout: The conversion's layout.
        fitted: `[windows, window]` int64, token ids that maps are fitted to.
        measured: `[windows, window]` int64, token ids of windows that are only measured.
        options: Batch size, and where and in which dtype states are kept.
    """
    return Walk(
        stack,
        layout,
        torch.cat([fitted, measured]),
        measured=len(measured),
        activation_dtype=activation_dtype(options),
        workspace=options.workspace,
        batch_size=options.batch_size,
    )
