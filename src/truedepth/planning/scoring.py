"""What merged segments lose, each alone in the original, and what whole plans lose.

Segments are compared with the original in walks through its sub-layers: all segments as they are,
then refitted. Plans are measured whole, refitted from the first segment to the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from truedepth.calibration.options import Calibration
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.trajectories import layer_stack, walk_through
from truedepth.calibration.windows import calibration_windows, given_text
from truedepth.checkpoint.records import Loss
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import loss_of
from truedepth.plan.plan import Plan
from truedepth.plan.stages import Segment, sublayers_of
from truedepth.progress import progress_bar
from truedepth.widening.layout import Layout

MEASURED_WINDOWS = 16  # of the text, for whole plans
ALONE_WINDOWS = 8  # of these, for each merge alone
AT_ONCE = 32  # segments per walk: the states of each are kept to the walk's end


@dataclass(frozen=True)
class Score:
    """What one segment loses when all else is the original's."""

    segment: Segment
    raw: Loss
    refitted: Loss | None
    """None if time ran out, if nothing is refitted, or if the raw loss is hopeless."""


class Scorer:
    """Measures segments and plans of one original on one text."""

    def __init__(
        self,
        layout: Layout,
        options: Calibration,
        segments: Sequence[Segment],
        refitted: Sequence[Segment],
    ) -> None:
        """Cut the text into windows.

        Args:
            layout: The original's.
            options: The text, and where and how to compute.
            segments: What may be merged, in the order of the first sub-layers.
            refitted: Those of them that may be refitted.

        Raises:
            TruedepthError: The text is too short, or options do not fit.
        """
        source = layout.source
        self._layout, self._options, self.segments = layout, options, segments
        if refitted:
            self._text = calibration_windows(source, options, refitted, MEASURED_WINDOWS)
        else:
            self._text, _ = given_text(source, options, (), MEASURED_WINDOWS)
        self._window = self._text.window
        if not len(self._text.measured) or not len(self._text.check):
            raise TruedepthError(
                "The text is too short to measure plans on; give more of it, or a smaller window."
            )
        self._stack = layer_stack(source, options)  # all plans share the original's layers

    @property
    def forward_passes(self) -> float:
        """Passes of one window through all layers of the original so far."""
        return self._stack.token_passes / self._window

    def alone(
        self, segments: Sequence[Segment], refitted: bool, check: Callable[[], object]
    ) -> Iterator[tuple[Segment, Loss]]:
        """Each segment's loss when all else is the original's, as it becomes known.

        Args:
            segments: Some of `self.segments`, in their order.
            refitted: Whether segments are refitted before they are measured.
            check: Called before every sub-layer; what it raises ends the work.
        """
        title = "Merges, refitted" if refitted else "Merges as they are"
        parts = [segments[i : i + AT_ONCE] for i in range(0, len(segments), AT_ONCE)]
        with progress_bar(title, len(parts) * len(self._layout.segments)) as advance:
            for part in parts:
                yield from self._alone(part, refitted, check, advance).items()

    def _alone(
        self,
        segments: Sequence[Segment],
        refitted: bool,
        check: Callable[[], object],
        advance: Callable[[int], object],
    ) -> dict[Segment, Loss]:
        """`alone` in one walk."""
        text = self._text
        fitted = text.fitted if refitted else text.fitted[:0]
        measured = text.measured[:ALONE_WINDOWS]
        walk = walk_through(self._stack, self._layout, fitted, measured, self._options)
        calibrator = Calibrator(walk)
        states: dict[Segment, Tensor] = {}
        ends = {segment: sublayers_of(segment)[-1] for segment in segments}
        for own in self._layout.segments:
            check()
            first = own[0][0]
            walk.onward(own, [x for segment, x in states.items() if ends[segment] < first])
            for segment in segments:
                if segment[0][0] == first:
                    refit = refitted and self._layout.is_merged(segment)
                    states[segment] = (calibrator.refit_aside if refit else walk.detour)(segment)
            walk.advance(own)
            advance(1)
        rows = walk.losses(list(states.values()))
        return {s: loss_of(r, self._window) for s, r in zip(states, rows, strict=True)}

    def whole(self, plan: Plan, refitted: bool, check: Callable[[], object]) -> tuple[Loss, Loss]:
        """A plan's loss, on the windows to compare plans on and on those of the final check.

        Args:
            plan: For the original's layers.
            refitted: Whether segments are refitted, from the first to the last.
            check: Called before every segment; what it raises ends the work.
        """
        text, layout = self._text, Layout(self._layout.source, plan)
        fitted = text.fitted if refitted else text.fitted[:0]
        both = torch.cat([text.measured, text.check])
        walk = walk_through(self._stack, layout, fitted, both, self._options)
        calibrator = Calibrator(walk)
        title = f"A plan of {plan.all_reduces} stages"
        with progress_bar(title, len(layout.segments)) as advance:
            for segment in layout.segments:
                check()
                if refitted and layout.is_merged(segment):
                    calibrator.refit(segment)
                else:
                    walk.advance(segment)
                advance(1)
        rows, measured = walk.losses()[0], len(text.measured)
        return loss_of(rows[:measured], self._window), loss_of(rows[measured:], self._window)
