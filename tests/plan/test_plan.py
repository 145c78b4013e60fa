from __future__ import annotations

import numpy as np
import pytest

from truedepth import Plan, TruedepthError
from truedepth.plan.spans import parse_span


def test_a_span_pairs_consecutive_layers():
    plan = Plan.span(30, 14, 27)
    assert plan.groups[13:16] == ((13,), (14, 15), (16, 17))
    assert plan.effective_depth == 23
    assert plan.paired_layers == 14
    assert plan.widths == [1] * 14 + [2] * 7 + [1] * 2


def test_groups_of_other_sizes():
    assert Plan.span(8, 1, 6, group=3).groups == ((0,), (1, 2, 3), (4, 5, 6), (7,))
    assert Plan.span(8, 1, 6, group=1).effective_depth == 8
    assert Plan(6, [[4, 5], [0, 1, 2]]).groups == ((0, 1, 2), (3,), (4, 5))


def test_all_reduces_are_two_a_layer_and_none_on_one_device():
    plan = Plan.span(30, 14, 27)
    assert plan.all_reduces == 46
    assert Plan(30).all_reduces == 60


def test_drawing():
    assert str(Plan.span(30, 14, 17)) == "0 1 … 13 [14+15] [16+17] 18 19 … 29"
    assert str(Plan(6, [[1, 2, 3]])) == "0 [1+2+3] 4 5"


@pytest.mark.parametrize(
    ("layers", "pairs", "expected"),
    [
        (30, 7, "0 1 … 13 [14+15] [16+17] [18+19] [20+21] [22+23] [24+25] [26+27] 28 29"),
        (8, 4, "[0+1] [2+3] [4+5] [6+7]"),
        (8, 3, "0 1 [2+3] [4+5] [6+7]"),
        (8, 0, "0 1 … 7"),
        (5, 2, "0 [1+2] [3+4]"),
        (2, 1, "[0+1]"),
    ],
)
def test_late_pairs(layers, pairs, expected):
    assert str(Plan.late_pairs(layers, pairs)) == expected


def test_layers_may_be_whole_numbers_of_other_types():
    assert Plan(6, [np.arange(1, 3)]) == Plan(6, [[1, 2]])


def test_yaml_round_trip(tmp_path):
    plan = Plan.span(30, 14, 17, model="a/b")
    plan.to_yaml(tmp_path / "plan.yaml")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == plan
    text = (tmp_path / "plan.yaml").read_text()
    assert text == "model: a/b\nnum_layers: 30\ngroups:\n- [14, 15]\n- [16, 17]\n"


def test_yaml_of_another_style(tmp_path):
    (tmp_path / "plan.yaml").write_text("num_layers: 30\ngroups: [[14, 15], [16, 17]]  # late\n")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == Plan.span(30, 14, 17)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Plan(30, [[29, 30]]), ["Layer 30", "0 to 29"]),
        (lambda: Plan(30, [[-1, 0]]), ["Layer -1", "0 to 29"]),
        (lambda: Plan(30, [[14, 15], [15, 16]]), ["Layer 15", "two groups"]),
        (lambda: Plan(30, [[14, 16]]), ["not consecutive", "layer 15"]),
        (lambda: Plan(30, [[15, 14]]), ["not consecutive"]),
        (lambda: Plan(30, [[]]), ["empty"]),
        (lambda: Plan(30, [["a"]]), ["'a'"]),
        (lambda: Plan(0), ["at least 1"]),
        (lambda: Plan.span(30, 14, 30), ["Layer 30", "0 to 29"]),
        (lambda: Plan.span(30, 14, 26), ["length 13", "layer 25 or 27"]),
        (lambda: Plan.span(30, 29, 29), ["length 1", "group size 2."]),
        (lambda: Plan.span(30, 14, 12), ["empty"]),
        (lambda: Plan.span(30, 14, 15, group=0), ["at least 1"]),
        (lambda: Plan.late_pairs(30, 16), ["16 pairs", "0 to 15"]),
        (lambda: parse_span("14..27"), ["14..27", "14-27"]),
        (lambda: Plan.from_dict([], "p.yaml"), ["p.yaml", "num_layers"]),
        (lambda: Plan.from_dict({"groups": []}, "p.yaml"), ["p.yaml", "num_layers"]),
        (lambda: Plan.from_dict({"num_layers": 4, "groups": 3}, "p.yaml"), ["list of lists"]),
        (lambda: Plan.from_dict({"num_layers": 4, "groups": [], "pairs": 2}, "p"), ["'pairs'"]),
        (lambda: Plan.from_dict({"num_layers": 4, "groups": [], "model": 2}, "p"), ["model"]),
        (lambda: Plan.from_dict({"num_layers": "4", "groups": []}, "p"), ["'4'"]),
    ],
)
def test_errors_name_the_layer_and_the_range(build, words):
    with pytest.raises(TruedepthError) as caught:
        build()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("content", ["groups: [", "\x00", "- 1", "!!python/object:os.system {}"])
def test_broken_plan_files(tmp_path, content):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(TruedepthError, match=r"plan\.yaml"):
        Plan.from_yaml(tmp_path / "plan.yaml")


def test_missing_plan_file(tmp_path):
    with pytest.raises(TruedepthError, match="Cannot read the plan"):
        Plan.from_yaml(tmp_path / "none.yaml")
