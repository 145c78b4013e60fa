"""What a search may merge."""

from __future__ import annotations

from collections import Counter

import pytest

import truedepth as td
from family_models import options_of
from truedepth.plan.stages import group_of, group_segment, stage_of
from truedepth.planning.candidates import form_of, promising, segments_to_merge
from truedepth.planning.options import Merges
from truedepth.widening.layout import Layout


@pytest.fixture
def layout(make_model):
    def layout(case="llama", **options):
        return Layout(td.open_source(make_model(**options_of(case), **options)), td.Plan(6))

    return layout


def names(segments):
    return ["+".join(" ".join(map(str, stage)) for stage in segment) for segment in segments]


def test_every_merge_is_a_candidate_once(layout):
    found = segments_to_merge(layout(), Merges(max_group=3, max_run=4))
    assert len(set(found)) == len(found)
    order = [f"{kind}{layer}" for layer in range(6) for kind in "AF"]
    runs = {" ".join(order[i:j]) for i in range(12) for j in range(i + 2, min(i + 4, 12) + 1)}
    groups = {
        "+".join(" ".join(f"{kind}{layer}" for layer in range(i, j)) for kind in "AF")
        for i in range(6)
        for j in range(i + 2, min(i + 3, 6) + 1)
    }
    assert set(names(found)) == runs | groups
    firsts = [segment[0][0].position for segment in found]
    assert firsts == sorted(firsts)  # as a walk comes to them
    assert Counter(map(form_of, found)) == {"pairs": 9, "staggered": 5, "blocks": 6, "runs": 19}


def test_what_forms_are_called(layout):
    found = segments_to_merge(layout(), Merges(max_group=2, max_run=3))
    by_name = dict(zip(names(found), map(form_of, found), strict=True))
    assert by_name["F2 A3"] == "staggered"
    assert by_name["A2 F2"] == "blocks"
    assert by_name["A2 F2 A3"] == by_name["F2 A3 F3"] == "runs"
    assert by_name["A2 A3+F2 F3"] == "pairs"


@pytest.mark.parametrize("case", ["gemma2", "olmo2"])
def test_layers_side_by_side_are_no_candidates_where_stages_save_all_reduces(layout, case):
    found = segments_to_merge(layout(case), Merges(max_group=3, max_run=3))
    assert {form_of(each) for each in found} == {"staggered", "blocks", "runs"}


@pytest.mark.parametrize(
    ("case", "form"),
    [("llama", "pairs"), ("cohere", "pairs"), ("gemma2", "pairs"), ("olmo2", "pairs")],
)
def test_groups_alone(layout, case, form):
    found = segments_to_merge(layout(case), Merges(form, 3, 3))
    assert sorted(map(group_of, found)) == [
        *((0, 1), (0, 1, 2), (1, 2), (1, 2, 3), (2, 3), (2, 3, 4), (3, 4), (3, 4, 5), (4, 5))
    ]


@pytest.mark.parametrize("case", ["cohere", "cohere2", "pythia"])
def test_whole_layers_where_attention_and_ffn_read_one_state(layout, case):
    found = segments_to_merge(layout(case), Merges(max_group=3, max_run=3))
    assert Counter(len(segment[0]) for segment in found) == {2: 6, 4: 5, 6: 4}
    assert all(names([each])[0].startswith("A") and len(each) == 1 for each in found)


def test_groups_that_cannot_be_joined_are_left_out(layout):
    """StarCoder2's norms have biases, which its maps absorb if they have biases too."""
    kinds = [
        Counter(
            map(form_of, segments_to_merge(layout("starcoder2", use_bias=bias), Merges(max_run=2)))
        )
        for bias in (True, False)
    ]
    stages = {"staggered": 5, "blocks": 6}
    assert kinds == [Counter({"pairs": 5, **stages}), Counter(stages)]


def test_more_than_a_model_has(layout):
    found = segments_to_merge(layout(), Merges(max_group=99, max_run=99))
    assert len(found) == 15 + 66  # of 6 layers, and of 12 sub-layers


def test_what_is_worth_refitting():
    """Unless others save as much, in the same place, for less than a quarter of its loss."""
    stage = {name: (stage_of(name.split()),) for name in ("F0 A1", "A1 F1", "F1 A2", "A1 F1 A2")}
    pair = group_segment((1, 2))
    raw = {stage["F0 A1"]: 0.1, stage["A1 F1"]: 0.5, stage["F1 A2"]: 0.3, stage["A1 F1 A2"]: 0.9}
    assert promising(4, raw) == [stage["F0 A1"], stage["F1 A2"], stage["A1 F1 A2"]]
    assert promising(4, raw | {pair: 1.59})[-1] == pair  # [F0 A1] [F1 A2] lose 0.4
    assert pair not in promising(4, raw | {pair: 1.61})
    alone = {stage["F1 A2"]: 9.0, group_segment((3, 4)): 0.1}  # the other is not in its place
    assert promising(5, alone) == list(alone)
