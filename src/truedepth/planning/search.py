"""The best plan under a budget of depth or of loss.

Every candidate group is run alone, with all other layers as in the original, and compared with the
original: first as it is, then refitted. Such losses nearly add up, so the plans of least sum are
found exactly, for every depth at once. The best few are then refitted and measured whole, because
sums are not exact and the best plan before refitting need not be the best one after it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from truedepth.calibration.options import Calibration
from truedepth.calibration.trajectories import Group
from truedepth.checkpoint.records import Loss
from truedepth.errors import TruedepthError
from truedepth.options import Bounds, checked
from truedepth.plan.choose import cheapest_plans
from truedepth.plan.plan import Plan
from truedepth.planning.budget import Budget, OutOfTimeError
from truedepth.planning.options import SEARCH_CALIBRATION
from truedepth.planning.scoring import Score, Scorer
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source

NEAR = 1.3  # if a plan's loss is below NEAR times the limit, the others of its depth are tried too
SCORING = 0.6  # the share of the time after which plans are measured


@dataclass(frozen=True)
class Point:
    """The best plan found at one effective depth."""

    plan: Plan
    predicted: float
    """Sum of its groups' excess losses, nats per token."""

    measured: Loss | None
    """What the whole plan loses, refitted; None if it was not measured whole."""


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
    """One point per effective depth, beginning with the original's."""

    scores: list[Score]
    plans_measured: int
    forward_passes: float
    """Passes of one window through all layers of the original; a wide layer counts its members."""

    seconds: float
    stopped: bool
    """Whether the budget ran out before the search was done."""

    calibrated: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        points = [
            {
                "effective_depth": point.plan.effective_depth,
                "groups": [list(group) for group in point.plan.groups if len(group) > 1],
                "predicted": point.predicted,
                "measured": asdict(point.measured) if point.measured else None,
            }
            for point in self.frontier
        ]
        return asdict(self) | {"plan": self.plan.to_dict(), "frontier": points}


@checked
def search(
    model: str | Path | Source,
    *,
    pairs: Annotated[int | None, Bounds(1)] = None,
    depth: Annotated[int | None, Bounds(1)] = None,
    max_loss: Annotated[float | None, Bounds(above=0)] = None,
    max_group: Annotated[int, Bounds(2)] = 2,
    calibrate: bool = True,
    calibration: Calibration | None = None,
    candidates: Annotated[int, Bounds(1)] = 3,
    frontier: bool = False,
    budget: Annotated[float | None, Bounds(0)] = None,
) -> Search:
    """Find the plan of least loss at a depth, or the shallowest one within a loss.

    Args:
        model: An original: directory, `.gguf` file, hub id, `default`, or an open source.
        pairs: Find the best plan of this many pairs, or of wider groups that save as many layers.
        depth: Find the best plan of this effective depth.
        max_loss: Find the shallowest plan whose excess loss is at most this many nats per token.
            Give one of `pairs`, `depth` and `max_loss`.
        max_group: Largest number of layers in a group that a search considers.
        calibrate: Refit the plans that are compared, for a conversion that will be calibrated.
        calibration: Text and tokens that plans are refitted on; default: `SEARCH_CALIBRATION`.
        candidates: Plans of least predicted loss to measure, at the depth that is chosen.
        frontier: Also measure a plan at each of the other effective depths.
        budget: Minutes after which the search takes the best plan so far. Default: no limit.

    Raises:
        TruedepthError: The goal is out of reach, or text or options do not fit the model.
    """
    source = open_source(model)
    if sum(goal is not None for goal in (pairs, depth, max_loss)) != 1:
        raise TruedepthError("Say how far to go with one of pairs, depth, max_loss.")
    if pairs is not None:
        depth = source.num_layers - pairs
    least = math.ceil(source.num_layers / max_group)
    if depth is not None and not least <= depth < source.num_layers:
        raise TruedepthError(
            f"An effective depth of {depth} is out of reach: groups of up to {max_group} take"
            f" {source.num_layers} layers to {least} to {source.num_layers - 1}."
        )
    clock = Budget(budget)
    scorer = Scorer(source, calibration or SEARCH_CALIBRATION, max_group)
    searcher = _Searcher(scorer, source.num_layers, max_group, calibrate, clock)
    searcher.score(candidates)
    if depth is not None:
        chosen = searcher.best_at(depth)
    else:
        assert max_loss is not None
        chosen = searcher.within(max_loss)
    if frontier:
        searcher.measure_frontier()
    return searcher.result(source, chosen, max_loss)


class _Searcher:
    """The scores and losses measured so far."""

    def __init__(
        self, scorer: Scorer, num_layers: int, max_group: int, calibrate: bool, budget: Budget
    ) -> None:
        self._scorer, self._num_layers = scorer, num_layers
        self._calibrate, self._budget = calibrate, budget
        self._groups = [
            tuple(range(first, first + size))
            for first in range(num_layers)
            for size in range(2, max_group + 1)
            if first + size <= num_layers
        ]
        self._scores: dict[Group, Score] = {}
        self._losses: dict[Plan, tuple[Loss, Loss]] = {}
        self.plans: dict[int, list[Plan]] = {}
        """By effective depth; the plan of least predicted loss first."""

    def score(self, count: int) -> None:
        """Every group by itself, and from these the best plans of every depth."""
        in_time = partial(self._budget.check, SCORING)
        try:
            for group, loss in self._scorer.alone(self._groups, False, in_time).items():
                self._scores[group] = Score(group, loss, None)
            if self._calibrate:
                for group, loss in self._scorer.alone(self._groups, True, in_time).items():
                    self._scores[group] = replace(self._scores[group], refitted=loss)
        except OutOfTimeError:
            if not self._scores:
                raise self._budget.too_small() from None
        costs = {group: self._loss(group).kl for group in self._scores}
        finite = {group: kl for group, kl in costs.items() if math.isfinite(kl)}
        self.plans = cheapest_plans(self._num_layers, finite, count)
        del self.plans[self._num_layers]

    def _loss(self, group: Group) -> Loss:
        score = self._scores[group]
        return score.refitted or score.raw

    def predicted(self, plan: Plan) -> float:
        """Sum of the excess losses of the plan's groups, nats per token."""
        return sum(self._loss(group).excess for group in plan.groups if len(group) > 1)

    def measure(self, plan: Plan) -> Loss:
        """The plan as a whole, refitted from first to last group."""
        if plan not in self._losses:
            self._budget.check()
            measured = self._scorer.whole(plan, self._calibrate, self._budget.check)
            self._losses[plan] = measured
        return self._losses[plan][0]

    def best_at(self, depth: int) -> Plan:
        """The plan of least measured KL among the most promising of a depth."""
        if depth not in self.plans:
            raise TruedepthError(f"No groups that keep the model finite reach depth {depth}.", 1)
        with contextlib.suppress(OutOfTimeError):
            for plan in self.plans[depth]:
                self.measure(plan)
        return self._best(depth)

    def _best(self, depth: int) -> Plan:
        measured = [plan for plan in self._losses if plan.effective_depth == depth]
        if not measured:
            raise self._budget.too_small()
        return min(measured, key=lambda plan: self._losses[plan][0].kl)

    def within(self, limit: float) -> Plan:
        """The shallowest plan whose measured loss plus one standard error is within a limit."""
        with contextlib.suppress(OutOfTimeError):
            shallowest = self._narrow(limit)
            for depth in sorted(depth for depth in self.plans if depth >= shallowest):
                self.measure(self.plans[depth][0])
                if self._held_out(limit, depth):
                    break
        for depth in sorted(self.plans):
            if plans := self._held_out(limit, depth):
                return min(plans, key=lambda plan: self._losses[plan][0].kl)
        if self._budget.spent:
            raise self._budget.too_small()
        least, check = min(self._losses.values(), key=lambda losses: losses[0].excess)
        raise TruedepthError(
            f"No plan stays within {limit:g} nats per token: the least excess loss found is"
            f" {least.excess:.4f} ± {least.stderr or 0:.4f}, {check.excess:.4f} on held-out text."
            " More tokens, or text nearer to the model's use, may lower it."
        )

    def _fits(self, plan: Plan, limit: float) -> bool:
        loss = self._losses[plan][0]
        return loss.excess + (loss.stderr or 0.0) <= limit

    def _held_out(self, limit: float, depth: int) -> list[Plan]:
        """Plans of a depth that fit, on held-out text as well; that can only rule plans out."""
        return [
            plan
            for plan, (_, check) in self._losses.items()
            if plan.effective_depth == depth and self._fits(plan, limit) and check.excess <= limit
        ]

    def _narrow(self, limit: float) -> int:
        """The shallowest depth with a plan that fits, or the original's depth.

        Bisects from where the predictions point to, corrected by what was measured.
        """
        depths = sorted(self.plans)
        fitting, failing, scale = self._num_layers, depths[0] - 1, 1.0
        while between := [depth for depth in depths if failing < depth < fitting]:
            promising = [d for d in between if scale * self.predicted(self.plans[d][0]) <= limit]
            depth = min(promising, default=between[-1])
            first, *others = self.plans[depth]
            excess = self.measure(first).excess
            if not self._fits(first, limit) and excess <= NEAR * limit:
                for plan in others:
                    self.measure(plan)
            if any(self._fits(p, limit) for p in self._losses if p.effective_depth == depth):
                fitting = depth
            else:
                failing = depth
            if (predicted := self.predicted(first)) > 0 and excess > 0:
                scale = excess / predicted
        return fitting

    def measure_frontier(self) -> None:
        """The most promising plan of every depth."""
        with contextlib.suppress(OutOfTimeError):
            for plans in self.plans.values():
                self.measure(plans[0])

    def result(self, source: Source, plan: Plan, max_loss: float | None) -> Search:
        """What was found, with the plan that was chosen."""
        points = []
        for depth, plans in self.plans.items():
            measured = any(p.effective_depth == depth for p in self._losses)
            best = self._best(depth) if measured else plans[0]
            loss = self._losses[best][0] if measured else None
            points.append(Point(best, self.predicted(best), loss))
        return Search(
            source=source.label,
            plan=Plan(plan.num_layers, plan.groups, source.name),
            loss=self._losses[plan][0],
            check=self._losses[plan][1],
            max_loss=max_loss,
            frontier=points,
            scores=list(self._scores.values()),
            plans_measured=len(self._losses),
            forward_passes=self._scorer.forward_passes,
            seconds=self._budget.seconds,
            stopped=self._budget.spent,
            calibrated=self._calibrate,
        )
