"""Stages of sub-layers: what they are, how they are written, and what is refused."""

from __future__ import annotations

import random

import pytest

from truedepth import Plan, TruedepthError
from truedepth.plan.config import plan_entries, plan_of
from truedepth.plan.stages import Sublayer, group_of


def names(plan):
    return [" ".join(map(str, stage)) for stage in plan.stages]


def test_an_original_has_two_stages_a_layer():
    assert names(Plan(2)) == ["A0", "F0", "A1", "F1"]
    assert [str(Sublayer.at(place)) for place in range(4)] == names(Plan(2))


def test_a_staggered_span():
    plan = Plan.staggered(30, 14, 16)
    assert names(plan)[27:34] == ["F13", "A14", "F14 A15", "F15 A16", "F16", "A17", "F17"]
    assert (plan.all_reduces, plan.effective_depth) == (58, 29)
    assert Plan.staggered(30, 0, 29).all_reduces == 31  # L + 1 of 2 L
    assert Plan.staggered(30, 14, 27).effective_depth == 23.5


def test_stages_beside_groups():
    plan = Plan(6, [[0, 1]], stages=[["F3", "A4", "F4"], ["A2", "F2"]])
    assert names(plan) == ["A0 A1", "F0 F1", "A2 F2", "A3", "F3 A4 F4", "A5", "F5"]
    assert plan.effective_depth == 3.5
    assert plan.merged == Plan(6, stages=[["A2", "F2"], ["F3", "A4", "F4"]]).merged


def test_a_sublayer_named_alone_stays_alone():
    assert Plan(4, stages=[["F1"], ["A2"]]) == Plan(4)


@pytest.mark.parametrize(
    ("plan", "drawn"),
    [
        (Plan.staggered(30, 14, 16), "0 1 … 13 · A14 [F14 A15] [F15 A16] F16 · 17 18 … 29"),
        (
            Plan.staggered(30, 14, 27),
            "0 1 … 13 · A14 [F14 A15] [F15 A16] … [F26 A27] F27 · 28 29",
        ),
        (Plan(6, [[0, 1]], stages=[["A2", "F2"]]), "[0+1] · [A2 F2] · 3 4 5"),
        (Plan.staggered(2, 0, 1), "A0 [F0 A1] F1"),
    ],
)
def test_drawing(plan, drawn):
    assert str(plan) == drawn


def test_files(tmp_path):
    plan = Plan(30, [[20, 21]], "a/b", [["F14", "A15"], ["A17", "F17"]])
    plan.to_yaml(tmp_path / "plan.yaml")
    assert (tmp_path / "plan.yaml").read_text() == (
        "model: a/b\nnum_layers: 30\ngroups:\n- [20, 21]\nstages:\n- [F14, A15]\n- [A17, F17]\n"
    )
    assert Plan.from_yaml(tmp_path / "plan.yaml") == plan
    (tmp_path / "plan.yaml").write_text("num_layers: 30\nstages: [[F14, A15], [A20, F20]]\n")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == Plan(
        30, stages=[["A20", "F20"], ["F14", "A15"]]
    )


def test_config_json_numbers_layers_as_they_are_in_the_checkpoint():
    plan = Plan(8, [[1, 2], [5, 6]], stages=[["F3", "A4"], ["A7", "F7"]])
    wide = plan_entries(plan, ((0,), (1,), (2,), (3,), (4,), (5,)))
    assert wide["stages"] == [["F2", "A3"], ["A5", "F5"]]
    assert plan_of(wide) == plan
    beside = plan_entries(plan, ((0,), (1, 2), (3,), (4,), (5,), (6,)))  # 1 and 2 side by side
    assert beside["stages"] == [["F3", "A4"], ["A6", "F6"]]
    assert plan_of(beside) == plan


@pytest.mark.parametrize("seed", range(20))
def test_segments_end_wherever_the_same_sublayers_have_run(seed):
    generator = random.Random(seed)
    layers, groups, stages = 9, [], []
    place = 0
    while place < 2 * layers:  # a plan of groups, runs and sub-layers alone
        size = min(generator.randint(1, 4), 2 * layers - place)
        if place % 2 == 0 and place // 2 + size <= layers and generator.random() < 0.3:
            groups.append(range(place // 2, place // 2 + size))
            place += 2 * size
        else:
            stages.append([Sublayer.at(each) for each in range(place, place + size)])
            place += size
    plan = Plan(layers, groups, stages=stages)
    ran, expected, running = [], [], []
    for stage in plan.stages:
        running.append(stage)
        ran += [2 * each.layer + "AF".index(str(each)[0]) for each in stage]
        if sorted(ran) == list(range(len(ran))):  # so has the original, up to here
            expected.append(tuple(running))
            running = []
    assert list(plan.segments) == expected and not running
    assert {group_of(each) for each in plan.segments if len(each) > 1} == {
        group for group in plan.groups if len(group) > 1
    }
    assert {each[0] for each in plan.segments if len(each) == 1 < len(each[0])} == {*plan.merged}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Plan(30, stages=[["F14", "A16"]]), ["F14 is followed by A16 instead of A15"]),
        (lambda: Plan(30, stages=[["A15", "F14"]]), ["A15 is followed by F14 instead of F15"]),
        (lambda: Plan(30, stages=[["A14", "A15"]]), ["A14 is followed by A15 instead of F14"]),
        (
            lambda: Plan(30, stages=[["F14", "A15"], ["A15", "F15"]]),
            ["A15 is in two stages, [F14 A15] and [A15 F15]"],
        ),
        (lambda: Plan(30, stages=[["F29", "A30"]]), ["A30 is out of range", "0 to 29"]),
        (lambda: Plan(30, stages=[[]]), ["empty"]),
        (lambda: Plan(30, stages=[["B14"]]), ["'B14' is not a sub-layer"]),
        (lambda: Plan(30, stages=[[14, 15]]), ["14 is not a sub-layer"]),
        (
            lambda: Plan(30, [[14, 15]], stages=[["F13", "A14"]]),
            ["A14 is in the stage [F13 A14]", "group [14, 15]"],
        ),
        (lambda: Plan.staggered(30, 14, 30), ["Layer 30 is out of range"]),
        (lambda: Plan.staggered(30, 14, 14), ["holds one layer"]),
        (lambda: Plan.staggered(30, 14, 12), ["is empty"]),
        (lambda: Plan.from_dict({"num_layers": 4, "stages": 3}, "p"), ["list of lists"]),
        (lambda: Plan.from_dict({"num_layers": 4, "stages": [["A9"]]}, "p"), ["A9"]),
        (
            lambda: plan_of({"layer_widths": [1, 1], "num_hidden_layers": 2, "stages": [["F9"]]}),
            ["stages must be", "neighbouring"],
        ),
        (
            lambda: plan_of({"layer_widths": [1, 1], "num_hidden_layers": 2, "stages": 7}),
            ["stages must be"],
        ),
    ],
)
def test_what_is_refused_names_the_sublayer(build, words):
    with pytest.raises(TruedepthError) as caught:
        build()
    for word in words:
        assert word in str(caught.value)
