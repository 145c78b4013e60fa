"""The exact choice of groups by dynamic programming, where their costs add up."""

from __future__ import annotations

from collections.abc import Mapping

from truedepth.plan.plan import Plan

Costs = Mapping[tuple[int, ...], float]
"""Costs of groups of two or more consecutive layers; a group without a cost is not chosen."""


def cheapest_plans(num_layers: int, costs: Costs, count: int = 1) -> dict[int, list[Plan]]:
    """The plans of least total cost for every effective depth that the groups allow.

    Args:
        num_layers: Number of decoder layers of the original.
        costs: In any unit; a layer alone costs nothing.
        count: Most plans per depth.

    Returns:
        Effective depth -> its plans, cheapest first; depths from the original's downward.
    """
    # best[end][depth]: total cost and groups of the best ways through the first `end` layers.
    best: list[dict[int, list[tuple[float, tuple[tuple[int, ...], ...]]]]] = [{0: [(0.0, ())]}]
    for end in range(1, num_layers + 1):
        options = {depth + 1: list(found) for depth, found in best[end - 1].items()}
        for group, cost in costs.items():
            if group[-1] == end - 1:
                for depth, found in best[group[0]].items():
                    ways = [(total + cost, (*groups, group)) for total, groups in found]
                    options.setdefault(depth + 1, []).extend(ways)
        best.append({depth: sorted(found)[:count] for depth, found in options.items()})
    return {
        depth: [Plan(num_layers, groups) for _, groups in found]
        for depth, found in sorted(best[num_layers].items(), reverse=True)
    }
