"""An original and its conversion, walked through side by side, segment after segment.

For every token only the two states that enter the models' next layers are kept. Layers are loaded
from disk when they are needed and freed afterwards. Windows that maps are *fitted* to come first,
followed by windows that are only *measured*.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor

from truedepth.calibration.options import Calibration
from truedepth.calibration.windows import activation_dtype, placement
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import Predictions, window_measures
from truedepth.files.scratch import mapped
from truedepth.plan.stages import Segment, Sublayer, group_of, ranks_of, sublayers_of
from truedepth.runtime.calls import Calls
from truedepth.runtime.layer_stack import LayerStack
from truedepth.runtime.stage import LoadedSublayer, run_local_stage, run_stage
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor, from_tensor
from truedepth.widening.layout import Layout

Batch = tuple[slice, Calls]
"""Some windows, and how every layer is called for them."""


class Walk:
    """Both models' states before the same sub-layer of the original."""

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
            layout: Says what segments become, and gives their weights.
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
        """What enters the next sub-layer of the original: `[windows, length, hidden]`."""

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
        """What enters the converted model's next stage; the same tensor until the first merge."""

    @property
    def batches(self) -> list[Batch]:
        """All windows."""
        return self.fitted + self.measured

    @property
    def restarts(self) -> bool:
        """Whether the original starts each merged segment from the converted model's states.

        On fitted windows, in plans with stages of sub-layers. In plans of groups alone, and on
        measured windows, each model reads its own states.
        """
        return bool(self.layout.plan.merged)

    def restart(self) -> None:
        """Take the fitted windows' original to where the converted model is."""
        self.original_states[: self._first] = self.converted_states[: self._first]

    def allocate(self, windows: int) -> Tensor:
        """One vector per token: `[windows, length, hidden]`, zeros."""
        shape = (windows, self._ids.shape[1], self.stack.hidden_size)
        if self._workspace is None or not windows:  # no file is empty
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
        """From the first merged segment on the two models' states differ."""
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

    def weights(self, segment: Segment) -> dict[str, Tensor]:
        """The weights of a segment's maps that are refitted, before they are, float32, by name.

        Of a wide layer these are all of its tensors, by the names of its first member; of a local
        stage the biases of the maps that read too.
        """
        tensors: dict[int, dict[str, LazyTensor]] = defaultdict(dict)
        if group := group_of(segment):
            tensors[group[0]] |= self.layout.wide_layer(group, torch.float32)
        else:
            family = self.layout.source.family
            maps = {f"{name}.weight" for name in (*family.reads, *family.writes)}
            if ranks_of(segment[0]) is not None:  # rows may change places
                maps |= {f"{name}.bias" for name in family.reads}
            for each in sublayers_of(segment):
                own = self.stack.sublayer_tensors(each)
                tensors[each.layer] |= {name: own[name] for name in own if name in maps}
        return {
            self._prefix(layer) + name: tensor.read().to(torch.float32, copy=True)
            for layer, named in tensors.items()
            for name, tensor in named.items()
        }

    def loaded(
        self, segment: Segment, weights: Mapping[str, Tensor] | None = None
    ) -> list[list[LoadedSublayer]]:
        """The stages that a segment becomes.

        Args:
            segment: Of the converted model.
            weights: Instead of those of the original or of an exact wide layer, named as by
                `weights`.
        """
        group = group_of(segment)
        if group and not self.layout.is_merged(segment):
            return self.stack.stages({layer: self.stack.layer(layer) for layer in group})
        if group:
            tensors = self.layout.wide_layer(group, torch.float32)
            if weights is not None:
                tensors = self._within(group[0], weights)
            return self.stack.stages({group[0]: self.stack.wide_layer(group, tensors)})
        return [
            [self._sublayer(each, weights, ranks_of(stage)) for each in stage] for stage in segment
        ]

    def _sublayer(
        self, which: Sublayer, weights: Mapping[str, Tensor] | None, ranks: int | None
    ) -> LoadedSublayer:
        tensors = None
        if weights is not None:
            part_of = partial(self.layout.source.family.part_of, which.kind)
            layer = self._within(which.layer, weights)
            tensors = {name: tensor for name, tensor in layer.items() if part_of(name)}
        return self.stack.sublayer(which, tensors, ranks)

    def _within(self, layer: int, weights: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
        """Those of the weights that belong to a layer, by name within it."""
        prefix = self._prefix(layer)
        return {
            name.removeprefix(prefix): from_tensor(weight)
            for name, weight in weights.items()
            if name.startswith(prefix)
        }

    def _prefix(self, layer: int) -> str:
        return self.layout.source.family.layer.format(layer)

    def originals(self, segment: Segment) -> Iterator[list[list[LoadedSublayer]]]:
        """The stages of the original that a segment stands for, a layer at a time."""
        for layer, members in groupby(sublayers_of(segment), attrgetter("layer")):
            if group_of(segment):
                yield self.stack.stages({layer: self.stack.layer(layer)})
            elif self.stack.parallel:
                yield [[self.stack.sublayer(each) for each in members]]
            else:
                yield [[self.stack.sublayer(each)] for each in members]

    @torch.inference_mode()
    def advance(self, segment: Segment, weights: Mapping[str, Tensor] | None = None) -> None:
        """Take both models past a segment.

        Args:
            segment: The next of the converted model.
            weights: What it becomes, named as by `weights`; default: what is not refitted.
        """
        if weights is not None or not self.layout.is_exact(segment[0]):
            self.separate()
        apart = self.converted_states is not self.original_states
        if apart:
            self._run(self.loaded(segment, weights), self.converted_states, self.batches)
        if followed := self.measured if apart and self.restarts else self.batches:
            for stages in self.originals(segment):
                self._run(stages, self.original_states, followed)

    @torch.inference_mode()
    def detour(self, segment: Segment) -> Tensor:
        """The states of the measured windows behind a segment; all before it is the original.

        Args:
            segment: The next, with the original's weights.

        Returns:
            `[measured windows, length, hidden]`. Both models stay where they are.
        """
        states = self.original_states[self._first :].clone()
        self._run(self.loaded(segment), states, self.measured, self._first)
        return states

    @torch.inference_mode()
    def onward(self, segment: Segment, states: Sequence[Tensor]) -> None:
        """Run states of the measured windows through layers of the original, in place."""
        if states:
            for stages in self.originals(segment):
                for each in states:
                    self._run(stages, each, self.measured, self._first)

    def _run(
        self,
        stages: Sequence[Sequence[LoadedSublayer]],
        states: Tensor,
        batches: Sequence[Batch],
        first: int = 0,
    ) -> None:
        """Take windows' states past stages, in place.

        Args:
            stages: One after another.
            states: States of the windows from `first` on.
            batches: The windows to run.
            first: Number of the window that `states` begin with.
        """
        for windows, calls in batches:
            rows = slice(windows.start - first, windows.stop - first)
            x = self.batch(states, rows)
            for stage in stages:
                run = run_stage if stage[0].ranks is None else run_local_stage
                x = run(x, stage, calls)
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
