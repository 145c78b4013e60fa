"""Exact choice of groups by dynamic programming, where their costs add up."""

from __future__ import annotations

from collections.abc import Mapping

from truedepth.plan import Plan

Costs = Mapping[tuple[int, ...], float]
"""Of groups of two or more consecutive layers; a group without a cost is not chosen."""


def cheapest_plans(num_layers: int, costs: Costs) -> dict[int, Plan]:
    """The plan of least total cost for every effective depth that the groups allow.

    Args:
        num_layers: Of the original model.
        costs: Any unit; a layer alone costs nothing.

    Returns:
        Plans by effective depth, the original's first.
    """
    # Of the first `end` layers at a depth: total cost, and the groups.
    best: list[dict[int, tuple[float, tuple[tuple[int, ...], ...]]]] = [{0: (0.0, ())}]
    for end in range(1, num_layers + 1):
        options = {depth + 1: found for depth, found in best[end - 1].items()}
        for group, cost in costs.items():
            if group[-1] == end - 1:
                for depth, (total, groups) in best[group[0]].items():
                    if depth + 1 not in options or total + cost < options[depth + 1][0]:
                        options[depth + 1] = total + cost, (*groups, group)
        best.append(options)
    return {
        depth: Plan(num_layers, groups)
        for depth, (_, groups) in sorted(best[num_layers].items(), reverse=True)
    }
