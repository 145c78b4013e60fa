"""What groups of layers lose, each alone in the original, and what whole plans lose.

Groups are compared with the original in one walk through its layers for all groups as they are,
and one for all groups refitted. Plans are measured whole, refitted from first to last group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truedepth.calibration.options import Calibration
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.trajectories import Group, layer_stack, walk_through
from truedepth.calibration.windows import calibration_windows
from truedepth.checkpoint.records import Loss
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import loss_of
from truedepth.plan.plan import Plan
from truedepth.progress import progress_bar
from truedepth.sources.source import Source
from truedepth.widening.layout import Layout

MEASURED_WINDOWS = 16


@dataclass(frozen=True)
class Score:
    """What one group loses when all other layers are the original's."""

    group: Group
    raw: Loss
    refitted: Loss | None
    """None if time ran out, or if nothing is refitted."""


class Scorer:
    """Measures groups and plans of one original on one text."""

    def __init__(self, source: Source, options: Calibration, max_group: int) -> None:
        """Cut the text into windows.

        Args:
            source: The original.
            options: The text, and where and how to compute.
            max_group: Layers in the widest group that is measured.

        Raises:
            TruedepthError: The text is too short, or options do not fit.
        """
        self._source, self._options = source, options
        self._text = calibration_windows(source, options, max_group, MEASURED_WINDOWS)
        self._window = self._text.window
        if not len(self._text.measured) or not len(self._text.check):
            raise TruedepthError(
                "The text is too short to measure plans on; give more of it, or a smaller window."
            )
        # All plans share the original's layers, and wide layers are made for any group on demand.
        self._stack = layer_stack(source, options)
        self._layout = Layout(source, Plan(source.num_layers))

    @property
    def forward_passes(self) -> float:
        """Passes of one window through all layers of the original so far."""
        return self._stack.token_passes / self._window

    def alone(
        self, groups: Sequence[Group], refitted: bool, check: Callable[[], object]
    ) -> dict[Group, Loss]:
        """Each group's loss when all other layers are the original's.

        Args:
            groups: Consecutive layers each, in the order of their first layers.
            refitted: Whether wide layers are refitted before they are measured.
            check: Called before every layer; what it raises ends the work.
        """
        text = self._text
        fitted = text.fitted if refitted else text.fitted[:0]
        walk = walk_through(self._stack, self._layout, fitted, text.measured, self._options)
        calibrator = Calibrator(walk)
        states: dict[Group, Tensor] = {}
        title = "Groups, refitted" if refitted else "Groups as they are"
        with progress_bar(title, self._source.num_layers) as advance:
            for layer in range(self._source.num_layers):
                check()
                walk.onward(layer, [x for group, x in states.items() if group[-1] < layer])
                for group in groups:
                    if group[0] == layer:
                        refit = refitted and self._layout.is_wide(group)
                        states[group] = (calibrator.refit_aside if refit else walk.detour)(group)
                walk.advance((layer,))
                advance(1)
        rows = walk.losses(list(states.values()))
        return {g: loss_of(r, self._window) for g, r in zip(states, rows, strict=True)}

    def whole(self, plan: Plan, refitted: bool, check: Callable[[], object]) -> tuple[Loss, Loss]:
        """A plan's loss, on the windows to compare plans on and on those of the final check.

        Args:
            plan: For the original's layers.
            refitted: Whether wide layers are refitted, from the first to the last.
            check: Called before every group; what it raises ends the work.
        """
        text = self._text
        both = torch.cat([text.measured, text.check])
        walk = walk_through(self._stack, self._layout, text.fitted, both, self._options)
        calibrator = Calibrator(walk)
        with progress_bar(f"A plan of depth {plan.effective_depth}", len(plan.groups)) as advance:
            for group in plan.groups:
                check()
                if refitted and self._layout.is_wide(group):
                    calibrator.refit(group)
                else:
                    walk.advance(group)
                advance(1)
        rows, measured = walk.losses()[0], len(text.measured)
        return loss_of(rows[:measured], self._window), loss_of(rows[measured:], self._window)
