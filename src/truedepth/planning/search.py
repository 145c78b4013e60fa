"""The best plan under a budget of all-reduces or of loss.

Every merge, a group of layers or a stage of neighbouring sub-layers, is run alone, with all else as
in the original, and compared with the original: first as it is, then refitted. Such losses nearly
add up, so the plans of least sum are found exactly, for every number of stages at once. The best
few are then refitted and measured whole, because sums are not exact and the best plan before
refitting need not be the best one after it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

from truedepth.calibration.options import IN_FLOAT32, Calibration
from truedepth.calibration.windows import given_text
from truedepth.checkpoint.records import Loss
from truedepth.errors import TruedepthError
from truedepth.options import Bounds, checked
from truedepth.plan.choose import Costs, cheapest_plans, fastest_plans
from truedepth.plan.plan import Plan
from truedepth.plan.stages import Segment
from truedepth.planning.budget import Budget, OutOfTimeError
from truedepth.planning.candidates import FORMS, PAIRS, form_of, promising, segments_to_merge
from truedepth.planning.options import SEARCH_CALIBRATION, Merges
from truedepth.planning.result import Point, Search
from truedepth.planning.scoring import Score, Scorer
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.widening.layout import Layout
from truedepth.widening.padding import check_local, padded

NEAR = 1.3  # if a plan's loss is below NEAR times the limit, the others of its depth are tried too
CANDIDATES = 3  # plans of least predicted loss that are tried at a number of stages
SCORING = 0.6  # the share of the time after which plans are measured


@checked
def search(
    model: str | Path | Source,
    *,
    pairs: Annotated[int | None, Bounds(1)] = None,
    depth: Annotated[float | None, Bounds(1)] = None,
    all_reduces: Annotated[int | None, Bounds(1)] = None,
    max_loss: Annotated[float | None, Bounds(above=0)] = None,
    merges: Merges | None = None,
    calibrate: bool = True,
    calibration: Calibration | None = None,
    frontier: bool = False,
    budget: Annotated[float | None, Bounds(0)] = None,
    pad_heads: Annotated[int, Bounds(1)] = 1,
    seconds: Callable[[Plan], float] | None = None,
) -> Search:
    """Find the plan of least loss at a number of stages, or the one of fewest within a loss.

    Args:
        model: An original: directory, `.gguf` file, hub id, `default`, or an open source.
        pairs: Find the best plan of this many pairs, or of wider groups that save as many layers.
        depth: Find the best plan of this effective depth, half the number of stages: 23 or 22.5.
        all_reduces: Find the best plan of this many stages: all-reduces per token over several
            ranks.
        max_loss: Find the plan of fewest stages whose excess loss is at most this many nats per
            token. Give one of `pairs`, `depth`, `all_reduces` and `max_loss`.
        merges: What may be merged; `pairs` makes it groups of layers alone.
        calibrate: Refit the plans that are compared, for a conversion that will be calibrated.
        calibration: Text and tokens that plans are refitted on; default: `SEARCH_CALIBRATION`.
        frontier: Also measure a plan of each of the other numbers of stages.
        budget: Minutes after which the search takes the best plan so far. Default: no limit.
        pad_heads: Add heads of zeros until the head counts divide by this number of ranks; local
            stages need that.
        seconds: What a plan takes; with `max_loss`, find the plan that takes least instead of the
            one of fewest stages. Merges that alone save no time are left out.

    Raises:
        TruedepthError: The goal is out of reach, or text or options do not fit the model.
    """
    source = open_source(model)
    source.check_plain("which truedepth does not compute with")
    source = padded(source, pad_heads)
    if sum(goal is not None for goal in (pairs, depth, all_reduces, max_loss)) != 1:
        raise TruedepthError("Say how far to go with one of pairs, depth, all_reduces, max_loss.")
    original = Layout(source, Plan(source.num_layers))
    merges = merges or Merges()
    if pairs is not None:
        merges = replace(merges, form=PAIRS)
    check_local(source, merges.local)
    calibration = calibration or SEARCH_CALIBRATION
    if seconds is not None:
        given_text(source, calibration, [])  # is it there? Layers are timed before it is needed
    segments = segments_to_merge(original, merges, seconds)
    wanted = _stages_wanted(source.num_layers, pairs, depth, all_reduces)
    _check_reach(source, segments, wanted)
    refitted = [each for each in segments if original.is_merged(each)] if calibrate else []
    calibrate = bool(refitted)
    clock = Budget(budget)
    scorer = Scorer(original, calibration, segments, refitted)
    searcher = _Searcher(scorer, source.num_layers, calibrate, clock, seconds)
    searcher.score()
    if wanted is not None:
        chosen = searcher.best_of(wanted)
    else:
        assert max_loss is not None
        chosen = searcher.within(max_loss)
    if frontier:
        searcher.measure_frontier()
    return searcher.result(source, chosen, max_loss)


def _stages_wanted(
    num_layers: int, pairs: int | None, depth: float | None, all_reduces: int | None
) -> int | None:
    """The number of stages that a goal asks for; None if it asks for a loss."""
    if pairs is not None:
        depth = num_layers - pairs
    if depth is None:
        return all_reduces
    if 2 * depth % 1:
        raise TruedepthError(
            f"An effective depth of {depth:g} is not half a number of stages; give one such as"
            " 23 or 22.5."
        )
    return int(2 * depth)


def _check_reach(source: Source, segments: Sequence[Segment], wanted: int | None) -> None:
    """Refuse a number of stages that no plan of these merges has."""
    reached = cheapest_plans(source.num_layers, dict.fromkeys(segments, 0.0))
    stages, *fewer = reached
    if not fewer:
        raise TruedepthError(f"{source.name} has one layer, and no two can run together.")
    if wanted is not None and wanted not in fewer:
        most, least = fewer[0], fewer[-1]
        said = f"{least} to {most}" if least < most else f"{most}"
        step = "" if len(fewer) == most - least + 1 else ", in steps of 2"
        subject = "1 all-reduce is" if wanted == 1 else f"{wanted} all-reduces are"
        raise TruedepthError(
            f"{subject} out of reach (an effective depth of {wanted / 2:g}): these merges leave"
            f" {said} of the model's {stages}{step}."
        )


def _finite(losses: Costs) -> dict[Segment, float]:
    return {segment: loss for segment, loss in losses.items() if math.isfinite(loss)}


class _Searcher:
    """The scores and losses measured so far."""

    def __init__(
        self,
        scorer: Scorer,
        num_layers: int,
        calibrate: bool,
        budget: Budget,
        seconds: Callable[[Plan], float] | None,
    ) -> None:
        self._scorer, self._num_layers, self._seconds = scorer, num_layers, seconds
        self._calibrate, self._budget = calibrate, budget
        self._scores: dict[Segment, Score] = {}
        self._losses: dict[Plan, tuple[Loss, Loss]] = {}
        self.plans: dict[int, list[Plan]] = {}
        """By number of stages; the plan of least predicted loss first."""

        self._wanted: list[list[Plan]] = []
        """The plans to try within a loss, the most wanted first: of the fewest stages, or fastest.
        """

        self._by_form: dict[str, dict[int, list[Plan]]] = {}
        """Likewise, of one form alone."""

        self._hopeless = 0

    def score(self) -> None:
        """Every merge by itself, and from these the best plans of every number of stages."""
        in_time = partial(self._budget.check, SCORING)
        try:
            for segment, loss in self._scorer.alone(self._scorer.segments, False, in_time):
                self._scores[segment] = Score(segment, loss, None)
            if self._calibrate:
                raw = {segment: score.raw.kl for segment, score in self._scores.items()}
                worth = promising(self._num_layers, _finite(raw))
                self._hopeless = len(raw) - len(worth)
                for segment, loss in self._scorer.alone(worth, True, in_time):
                    self._scores[segment] = replace(self._scores[segment], refitted=loss)
        except OutOfTimeError:
            if not self._scores:
                raise self._budget.too_small() from None
        costs = _finite({segment: self._loss(segment).kl for segment in self._scores})
        self.plans = cheapest_plans(self._num_layers, costs, CANDIDATES)
        del self.plans[2 * self._num_layers]
        if not self.plans:
            raise TruedepthError(f"No merge gives outputs that are finite. {IN_FLOAT32}", 1)
        self._wanted = [self.plans[stages] for stages in sorted(self.plans)]
        if self._seconds is not None:
            fastest = fastest_plans(self._num_layers, costs, self._seconds)
            self._wanted = [[plan] for plan in fastest]
        raw = _finite({segment: score.raw.kl for segment, score in self._scores.items()})
        for form in FORMS:
            own = {segment: kl for segment, kl in raw.items() if form_of(segment) == form}
            self._by_form[form] = cheapest_plans(self._num_layers, own)

    def _loss(self, segment: Segment) -> Loss:
        score = self._scores[segment]
        return score.refitted or score.raw

    def predicted(self, plan: Plan, raw: bool = False) -> float:
        """Sum of the excess losses of the plan's merges, nats per token.

        Args:
            plan: Of merges that were measured alone.
            raw: Whether as they are, rather than refitted.
        """
        merged = [each for each in plan.segments if each in self._scores]
        return sum((self._scores[s].raw if raw else self._loss(s)).excess for s in merged)

    def measure(self, plan: Plan) -> Loss:
        """The plan as a whole, refitted from the first segment to the last."""
        if plan not in self._losses:
            self._budget.check()
            measured = self._scorer.whole(plan, self._calibrate, self._budget.check)
            self._losses[plan] = measured
        return self._losses[plan][0]

    def best_of(self, stages: int) -> Plan:
        """The plan of least measured KL among the most promising of a number of stages."""
        if stages not in self.plans:
            if self._budget.spent:
                raise self._budget.too_small()
            raise TruedepthError(f"No merges that keep the model finite give {stages} stages.", 1)
        with contextlib.suppress(OutOfTimeError):
            for plan in self.plans[stages]:
                self.measure(plan)
        return self._best(stages)

    def _best(self, stages: int) -> Plan:
        measured = [plan for plan in self._losses if plan.all_reduces == stages]
        if not measured:
            raise self._budget.too_small()
        return min(measured, key=lambda plan: self._losses[plan][0].kl)

    def within(self, limit: float) -> Plan:
        """The most wanted plan whose loss plus one standard error is within a limit."""
        with contextlib.suppress(OutOfTimeError):
            for alike in self._wanted[self._narrow(limit) :]:
                self.measure(alike[0])
                if self._held_out(limit, alike):
                    break
        for alike in self._wanted:
            if plans := self._held_out(limit, alike):
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
        loss = self._losses[plan][0] if plan in self._losses else None
        return loss is not None and loss.excess + (loss.stderr or 0.0) <= limit

    def _held_out(self, limit: float, plans: Sequence[Plan]) -> list[Plan]:
        """The plans that fit, on held-out text too; that can only rule plans out."""
        return [
            plan
            for plan in plans
            if self._fits(plan, limit) and self._losses[plan][1].excess <= limit
        ]

    def _narrow(self, limit: float) -> int:
        """Where the most wanted plan that fits is among those that are wanted, or their end.

        Bisects from where the predictions point to, corrected by what was measured.
        """
        fitting, failing, scale = len(self._wanted), -1, 1.0
        while between := range(failing + 1, fitting):
            sums = {at: scale * self.predicted(self._wanted[at][0]) for at in between}
            tried = min((at for at in between if sums[at] <= limit), default=between[-1])
            first, *others = self._wanted[tried]
            excess = self.measure(first).excess
            if not self._fits(first, limit) and excess <= NEAR * limit:
                for plan in others:
                    self.measure(plan)
            if any(self._fits(plan, limit) for plan in self._wanted[tried]):
                fitting = tried
            else:
                failing = tried
            if (predicted := self.predicted(first)) > 0 and excess > 0:
                scale = excess / predicted
        return fitting

    def measure_frontier(self) -> None:
        """The most promising plan of every number of stages."""
        with contextlib.suppress(OutOfTimeError):
            for plans in self.plans.values():
                self.measure(plans[0])

    def result(self, source: Source, plan: Plan, max_loss: float | None) -> Search:
        """What was found, with the plan that was chosen."""
        points = []
        for stages, plans in self.plans.items():
            measured = any(each.all_reduces == stages for each in self._losses)
            best = self._best(stages) if measured else plans[0]
            loss = self._losses[best][0] if measured else None
            by_form = {
                form: self.predicted(found[stages][0], raw=True)
                for form, found in self._by_form.items()
                if stages in found
            }
            points.append(Point(best, self.predicted(best), loss, by_form, self._time(best)))
        return Search(
            source=source.label,
            plan=Plan(plan.num_layers, plan.groups, source.name, plan.merged),
            loss=self._losses[plan][0],
            check=self._losses[plan][1],
            max_loss=max_loss,
            frontier=points,
            scores=list(self._scores.values()),
            plans_measured=len(self._losses),
            forward_passes=self._scorer.forward_passes,
            seconds=self._budget.seconds,
            hopeless=self._hopeless,
            stopped=self._budget.spent,
            calibrated=self._calibrate,
            time_before=self._time(plan.unpaired),
            time_after=self._time(plan),
        )

    def _time(self, plan: Plan) -> float | None:
        return None if self._seconds is None else self._seconds(plan)
