"""An original and its conversion, walked through side by side, layer after layer.

Of every token only the two states are kept that enter the models' next layers; the layers
themselves come from disk when they are due and are gone when they are passed. Windows that are
*fitted* to come first, windows that are only *measured* run along behind them.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truedepth.calibration.options import Calibration
from truedepth.calibration.windows import activation_dtype, placement
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import Predictions, window_measures
from truedepth.runtime.layer_stack import Calls, LayerStack
from truedepth.sources.source import Source
from truedepth.widening.layout import converted_config, converted_tensors, places_of_groups

Batch = tuple[slice, Calls]
"""Some windows, and how every layer is called for them."""


class Walk:
    """Both models' states before the same original layer."""

    def __init__(
        self,
        originals: LayerStack,
        converted: LayerStack,
        ids: Tensor,
        *,
        measured: int = 0,
        activation_dtype: torch.dtype = torch.float32,
        workspace: Path | None = None,
        batch_size: int = 8,
    ) -> None:
        """Embed the text.

        Args:
            originals: The original's layers.
            converted: The converted model's.
            ids: `[windows, length]` int64.
            measured: So many of the last windows are measured only.
            activation_dtype: Of the states that are kept.
            workspace: A directory for memory-mapped states; by default they are in memory.
            batch_size: Windows a forward pass.
        """
        self.originals, self.converted = originals, converted
        self._activation_dtype, self._workspace = activation_dtype, workspace
        self._ids, self._first = ids, len(ids) - measured
        self.original = self.states(len(ids))
        """What enters the next original layer."""

        self.fitted: list[Batch] = []
        self.measured: list[Batch] = []
        for batches, start, end in (
            (self.fitted, 0, self._first),
            (self.measured, self._first, len(ids)),
        ):
            for first in range(start, end, batch_size):
                batch = slice(first, min(first + batch_size, end))
                self.original[batch], calls = originals.start(ids[batch])
                batches.append((batch, calls))
        self.current = self.original
        """What enters the next layer of the converted model: the same until the first group."""

    @property
    def batches(self) -> list[Batch]:
        """All windows."""
        return self.fitted + self.measured

    @property
    def token_passes(self) -> float:
        """Tokens run through either model, in passes through all of the original's layers."""
        return self.originals.token_passes + self.converted.token_passes

    def states(self, windows: int) -> Tensor:
        """One vector a token: `[windows, length, hidden]`, zeros."""
        shape = (windows, self._ids.shape[1], self.originals.hidden_size)
        if self._workspace is None:
            return torch.zeros(shape, dtype=self._activation_dtype)
        count = math.prod(shape)
        # Without a name, its space is given back however the process ends; taken in advance, a full
        # disk is an error here and not a crash at a later write.
        size = count * self._activation_dtype.itemsize
        try:
            with tempfile.NamedTemporaryFile(dir=self._workspace) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                mapped = torch.from_file(
                    file.name, shared=True, size=count, dtype=self._activation_dtype
                )
        except OSError as error:
            raise TruedepthError(
                f"The workspace {self._workspace} cannot take {size / 1e6:,.0f} MB more of states:"
                f" {error.strerror}.",
                exit_code=1,
            ) from error
        return mapped.view(shape)

    def take(self, states: Tensor, batch: slice) -> Tensor:
        """Some windows' states where layers compute, in float32."""
        return states[batch].to(self.originals.device, torch.float32)

    def separate(self) -> None:
        """From the first group on the two models' states differ."""
        if self.current is self.original:
            self.current = self.copied(self.original)

    def copied(self, states: Tensor) -> Tensor:
        """The same states once more."""
        copy = self.states(len(states))
        copy.copy_(states)
        return copy

    @torch.inference_mode()
    def advance(
        self, index: int, group: Sequence[int], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take both models past layer `index` of the converted one.

        Args:
            index: In the converted model.
            group: The original layers that it stands for.
            weights: Of the wide layer, where they are not as they were converted.
        """
        if len(group) > 1 or self.current is not self.original:
            self.separate()
            layers = self.converted.layers(index)
            layers[0].load_state_dict(dict(weights or {}), strict=False)
            for batch, calls in self.batches:
                self.run(self.converted, layers, [calls[i] for i in group], self.current, batch)
        for layer in group:
            module = self.originals.layer(layer)
            for batch, calls in self.batches:
                self.run(self.originals, [module], [calls[layer]], self.original, batch)

    def run(
        self,
        stack: LayerStack,
        layers: Sequence[nn.Module],
        calls: Sequence[Mapping[str, Any]],
        states: Tensor,
        batch: slice,
    ) -> None:
        """Take some windows' states past layers that run side by side, in place.

        Calls are of the original layers; a wide layer takes the first of them.
        """
        x = self.take(states, batch)
        a = x
        for layer, call in zip(layers, calls, strict=False):
            a = a + stack.branch(layer, 0, x, call)
        entered = x if stack.parallel else a
        for layer, call in zip(layers, calls, strict=False):
            a = a + stack.branch(layer, 1, entered, call)
        states[batch] = a

    @torch.inference_mode()
    def detour(self, index: int, group: Sequence[int]) -> Tensor:
        """What the measured windows are behind one group, all before it being the original.

        Args:
            index: Of the wide layer in the converted model.
            group: The original layers that it stands for, the next ones.

        Returns:
            `[measured windows, length, hidden]`. Both models stay where they are.
        """
        states = self.original[self._first :].clone()
        self._run_measured(self.converted, self.converted.layers(index), group, states)
        return states

    @torch.inference_mode()
    def onward(self, layer: int, states: Sequence[Tensor]) -> None:
        """Run states of the measured windows through an original layer, in place."""
        module = self.originals.layer(layer)
        for each in states:
            self._run_measured(self.originals, [module], [layer], each)

    def _run_measured(
        self, stack: LayerStack, layers: list[nn.Module], group: Sequence[int], states: Tensor
    ) -> None:
        for batch, calls in self.measured:
            rows = slice(batch.start - self._first, batch.stop - self._first)
            self.run(stack, layers, [calls[layer] for layer in group], states, rows)

    @torch.inference_mode()
    def losses(self, states: Sequence[Tensor] = ()) -> Tensor:
        """How far the measured windows are from the original, when it is past its last layer.

        Args:
            states: Outputs of the last layer; by default the converted model's.

        Returns:
            `[states, measured windows, 4]` float64, as `window_measures` gives them.
        """
        each = states or [self.current[self._first :]]
        rows = []
        for window, ids in enumerate(self._ids[self._first :]):
            models = [self._predictions(state[window, :-1]) for state in each]
            original = self._predictions(self.original[self._first + window, :-1])
            rows.append(window_measures(ids[1:], models, original))
        return torch.stack(rows, 1)

    def _predictions(self, states: Tensor) -> Predictions:
        return lambda positions: self.originals.logits(states[positions])


def walk_of(
    source: Source,
    groups: Sequence[Sequence[int]],
    fitted: Tensor,
    measured: Tensor,
    options: Calibration,
) -> Walk:
    """At the start of the original and of its conversion with these groups.

    Args:
        source: The original.
        groups: One for each layer of the converted model.
        fitted: `[windows, window]` int64, token ids.
        measured: The same.
        options: Where and how to compute.
    """
    tensors = converted_tensors(source, groups, torch.float32)
    config = converted_config(source, groups, tensors)
    places = places_of_groups(source, groups)
    device, dtype = placement(source, options)
    return Walk(
        LayerStack(source, device=device, dtype=dtype),
        LayerStack(
            source, device=device, dtype=dtype, config=config, tensors=tensors, places=places
        ),
        torch.cat([fitted, measured]),
        measured=len(measured),
        activation_dtype=activation_dtype(options),
        workspace=options.workspace,
        batch_size=options.batch_size,
    )
