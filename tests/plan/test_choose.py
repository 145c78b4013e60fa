"""The dynamic programme against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from truedepth.plan.choose import cheapest_plans


def all_partitions(num_layers, longest):
    """Every way of cutting layers into groups, by where the cuts are."""
    for cuts in itertools.product([False, True], repeat=num_layers - 1):
        groups, group = [], [0]
        for layer, cut in enumerate(cuts, 1):
            if cut:
                groups.append(tuple(group))
                group = []
            group.append(layer)
        groups.append(tuple(group))
        if max(map(len, groups)) <= longest:
            yield groups


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [2, 3, 4])
def test_cheapest_plans_are_those_of_brute_force(longest, seed):
    generator = random.Random(seed)
    num_layers = 9
    costs = {
        tuple(range(start, start + size)): generator.uniform(-0.1, 1)
        for size in range(2, longest + 1)
        for start in range(num_layers - size + 1)
        if generator.random() < 0.9  # not every group has a cost
    }
    totals = {}
    for groups in all_partitions(num_layers, longest):
        wide = [group for group in groups if len(group) > 1]
        if all(group in costs for group in wide):
            total = sum(costs[group] for group in wide)
            totals.setdefault(len(groups), []).append(total)
    found = cheapest_plans(num_layers, costs, 4)
    assert list(found) == sorted(totals, reverse=True)
    for depth, plans in found.items():
        assert {plan.effective_depth for plan in plans} == {depth}
        assert len({plan.groups for plan in plans}) == min(4, len(totals[depth]))
        costs_found = [sum(costs[g] for g in plan.groups if len(g) > 1) for plan in plans]
        assert costs_found == pytest.approx(sorted(totals[depth])[:4])
