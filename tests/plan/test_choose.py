"""The dynamic programme against brute force."""

from __future__ import annotations

import random

import pytest

from truedepth import Plan
from truedepth.plan.choose import cheapest_plans, fastest_plans, plan_of_segments
from truedepth.plan.stages import group_segment, stage_of


def places(segment):
    """The places of a segment's sub-layers in the order A0 F0 A1 F1 …"""
    return {2 * each.layer + (each.kind == "ffn") for stage in segment for each in stage}


def merges(num_layers, longest_group, longest_run):
    """Every group and every stage of neighbours, of two and more."""
    order = [f"{kind}{layer}" for layer in range(num_layers) for kind in "AF"]
    runs = [
        (stage_of(order[start : start + size]),)
        for size in range(2, longest_run + 1)
        for start in range(len(order) - size + 1)
    ]
    groups = [
        group_segment(range(first, first + size))
        for size in range(2, longest_group + 1)
        for first in range(num_layers - size + 1)
    ]
    return runs + groups


def every_plan(num_layers, segments):
    """Every choice of segments that share no sub-layer, with the number of stages it leaves."""
    choices = [((), set(), 2 * num_layers)]
    for segment in segments:
        own = places(segment)
        saved = len(own) - len(segment)
        choices += [
            ((*chosen, segment), taken | own, stages - saved)
            for chosen, taken, stages in choices
            if not taken & own
        ]
    return [(chosen, stages) for chosen, _, stages in choices]


def test_there_are_as_many_plans_as_there_should_be():
    """Cuts between neighbours are free: 2^3 ways to cut A0 F0 A1 F1; and the pair."""
    assert len(every_plan(2, merges(2, 2, 4))) == 2**3 + 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("num_layers", "longest_group", "longest_run", "share"),
    [(3, 3, 4, 1.0), (4, 3, 4, 0.9), (5, 3, 3, 0.6), (7, 4, 1, 0.9), (5, 1, 2, 1.0)],
)
def test_cheapest_plans_are_those_of_brute_force(
    num_layers, longest_group, longest_run, share, seed
):
    generator = random.Random(seed)
    costs = {
        segment: generator.uniform(-0.1, 1)
        for segment in merges(num_layers, longest_group, longest_run)
        if generator.random() < share  # not every segment has a cost
    }
    totals = {}
    for chosen, stages in every_plan(num_layers, costs):
        totals.setdefault(stages, {})[plan_of_segments(num_layers, chosen)] = sum(
            costs[segment] for segment in chosen
        )
    found = cheapest_plans(num_layers, costs, 4)
    assert list(found) == sorted(totals, reverse=True)
    for stages, plans in found.items():
        assert {plan.all_reduces for plan in plans} == {stages}
        assert len(set(plans)) == len(plans) == min(4, len(totals[stages]))
        ours = [totals[stages][plan] for plan in plans]
        assert ours == pytest.approx(sorted(totals[stages].values())[:4])


def test_nothing_to_merge():
    assert cheapest_plans(3, {}) == {6: [Plan(3)]}


def test_a_plan_of_segments():
    segments = [group_segment((0, 1)), (stage_of(["F2", "A3"]),), (stage_of(["A4", "F4", "A5"]),)]
    expected = Plan(6, [[0, 1]], stages=[["F2", "A3"], ["A4", "F4", "A5"]])
    assert plan_of_segments(6, segments) == expected
    merged = [each for each in expected.segments if len(places(each)) > 1]
    assert merged == segments


def test_the_fastest_plans_are_those_that_nothing_beats():
    """Against all plans of few segments: none is faster at no more cost, and each end is there."""
    stage, pair = (stage_of(["F0", "A1"]),), group_segment([1, 2])
    block = (stage_of(["A0", "F0"]),)
    costs = {stage: 1.0, pair: 4.0, block: 5.0}
    saves = {stage: 2.0, pair: 6.0, block: 2.0}

    def seconds(plan):
        return 20.0 - sum(saves.get(each, 0.0) for each in plan.segments)

    found = fastest_plans(4, costs, seconds)
    assert [seconds(plan) for plan in found] == [12.0, 14.0, 18.0]
    assert found == [
        plan_of_segments(4, [block, pair]),
        plan_of_segments(4, [pair]),
        plan_of_segments(4, [stage]),
    ]
