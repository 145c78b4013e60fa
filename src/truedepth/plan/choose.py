"""The exact choice of segments by dynamic programming, where their costs add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from truedepth.plan.plan import Plan
from truedepth.plan.stages import Segment, group_of, sublayers_of

Costs = Mapping[Segment, float]
"""Costs of merged segments, groups and stages of several; one without a cost is not chosen."""

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


def plan_of_segments(num_layers: int, segments: Iterable[Segment]) -> Plan:
    """The plan of these merged segments; every other sub-layer is alone."""
    segments = list(segments)
    groups = [group for segment in segments if (group := group_of(segment))]
    return Plan(num_layers, groups, stages=[s[0] for s in segments if not group_of(s)])
