"""What a search found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from truedepth.checkpoint.records import Loss
from truedepth.plan.plan import Plan
from truedepth.plan.stages import written
from truedepth.planning.scoring import Score


@dataclass(frozen=True)
class Point:
    """The best plan found of one number of stages."""

    plan: Plan
    predicted: float
    """Sum of its merges' excess losses, nats per token."""

    measured: Loss | None
    """What the whole plan loses, refitted; None if it was not measured whole."""

    by_form: dict[str, float]
    """The same sum as the merges are, not refitted, of the plan that is best so and merges in one
    form alone; for each of `FORMS` that can have so many stages."""

    time: float | None = None
    """Seconds that the plan is predicted to take per token, if the search was for speed."""


@dataclass(frozen=True)
class Search:
    """What a search found."""

    source: str
    """The original's name and where it was found."""

    plan: Plan
    loss: Loss
    """What the plan loses on the windows that plans were compared on."""

    check: Loss
    """What the plan loses on windows that nothing was chosen by."""

    max_loss: float | None
    frontier: list[Point]
    """One point per number of stages, from the largest on."""

    scores: list[Score]
    plans_measured: int
    forward_passes: float
    """Passes of one window through all layers of the original; a wide layer counts its members."""

    seconds: float
    hopeless: int
    """Merges that were not refitted, for each loses too much as it is."""

    stopped: bool
    """Whether the budget ran out before the search was done."""

    calibrated: bool
    time_before: float | None = None
    """Seconds that the original is predicted to take per token, if the search was for speed."""

    time_after: float | None = None
    """Seconds that the plan is predicted to take per token, likewise."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        points = [
            {
                "all_reduces": point.plan.all_reduces,
                "effective_depth": point.plan.effective_depth,
                **{key: point.plan.to_dict().get(key, []) for key in ("groups", "stages")},
                "predicted": point.predicted,
                "by_form": point.by_form,
                "measured": asdict(point.measured) if point.measured else None,
                "time": point.time,
            }
            for point in self.frontier
        ]
        scores = [
            {
                "merged": [written(stage) for stage in score.segment],
                "raw": asdict(score.raw),
                "refitted": asdict(score.refitted) if score.refitted else None,
            }
            for score in self.scores
        ]
        plain = {"plan": self.plan.to_dict(), "frontier": points, "scores": scores}
        return asdict(replace(self, plan=self.plan.unpaired, frontier=[], scores=[])) | plain
