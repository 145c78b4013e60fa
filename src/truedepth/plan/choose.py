"""The exact choice of segments by dynamic programming, where their costs add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from truedepth.plan.plan import Plan
from truedepth.plan.stages import Segment, group_of, sublayers_of

Costs = Mapping[Segment, float]
"""Costs of merged segments, groups and stages of several; one without a cost is not chosen."""

PRICES = range(-12, 13)
"""Powers of two of the prices of a second that `fastest_plans` tries."""

Way = tuple[float, tuple[Segment, ...]]
"""The total cost and the merged segments of a way through the first sub-layers of a model."""


def cheapest_plans(num_layers: int, costs: Costs, count: int = 1) -> dict[int, list[Plan]]:
    """The plans of least total cost for every number of stages that the segments allow.

    Args:
        num_layers: Number of decoder layers of the original.
        costs: In any unit; a sub-layer alone costs nothing.
        count: Most plans per number of stages.

    Returns:
        Number of stages -> its plans, cheapest first; from the original's downward.
    """
    ending: dict[int, list[tuple[int, Segment, float]]] = {}
    for segment, cost in costs.items():
        first, *_, last = sublayers_of(segment)
        ending.setdefault(last.position + 1, []).append((first.position, segment, cost))
    # best[end][stages]: the cheapest ways through the first `end` sub-layers.
    best: list[dict[int, list[Way]]] = [{0: [(0.0, ())]}]
    for end in range(1, 2 * num_layers + 1):
        options = {stages + 1: list(found) for stages, found in best[end - 1].items()}
        for start, segment, cost in ending.get(end, ()):
            for stages, found in best[start].items():
                ways = [(total + cost, (*before, segment)) for total, before in found]
                options.setdefault(stages + len(segment), []).extend(ways)
        best.append({stages: sorted(found)[:count] for stages, found in options.items()})
    return {
        stages: [plan_of_segments(num_layers, segments) for _, segments in found]
        for stages, found in sorted(best[-1].items(), reverse=True)
    }


def fastest_plans(num_layers: int, costs: Costs, seconds: Callable[[Plan], float]) -> list[Plan]:
    """Plans than which none of these segments that is found is both faster and cheaper.

    Found are those that cost least when every second is worth a price, at many prices and every
    number of stages.

    Args:
        num_layers: Number of decoder layers of the original.
        costs: As for `cheapest_plans`.
        seconds: What a plan takes; what segments save nearly adds up.

    Returns:
        The plans, the fastest first. All are faster than the original.
    """
    original = seconds(Plan(num_layers))
    saved = {each: original - seconds(plan_of_segments(num_layers, [each])) for each in costs}
    scale = sum(map(abs, costs.values())) / (sum(map(abs, saved.values())) or 1.0)
    found: dict[Plan, float] = {}
    for price in (scale * 2.0**power for power in PRICES):
        priced = {each: cost - price * saved[each] for each, cost in costs.items()}
        for plans in cheapest_plans(num_layers, priced).values():
            found |= {plan: sum(costs.get(each, 0.0) for each in plan.segments) for plan in plans}
    best: list[Plan] = []
    least = math.inf
    for plan in sorted(found, key=lambda plan: (seconds(plan), found[plan])):
        if found[plan] < least and seconds(plan) < original:
            best.append(plan)
            least = found[plan]
    return best


def plan_of_segments(num_layers: int, segments: Iterable[Segment]) -> Plan:
    """The plan of these merged segments; every other sub-layer is alone."""
    segments = list(segments)
    groups = [group for segment in segments if (group := group_of(segment))]
    return Plan(num_layers, groups, stages=[s[0] for s in segments if not group_of(s)])
