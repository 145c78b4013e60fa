"""Rank-local stages in plans: how they are written, drawn, compared and refused."""

from __future__ import annotations

import copy
import pickle

import pytest

from truedepth import Plan, TruedepthError
from truedepth.plan.config import plan_entries, plan_of
from truedepth.plan.stages import LocalStage, stage_of

LOCAL = {"sublayers": ["F3", "A4"], "local": 2}
PLAN = Plan(8, [[1, 2]], stages=[LOCAL, ["F5", "A6"]])


def test_a_local_stage_is_not_the_stage_that_reads_one_state():
    local, merged = stage_of(LOCAL), stage_of(LOCAL["sublayers"])
    assert list(local) == list(merged) and local.ranks == 2
    assert local != merged and merged != local and len({local, merged}) == 2
    assert local == LocalStage(merged, 2) != LocalStage(merged, 3)
    assert Plan(8, [[1, 2]], stages=[LOCAL["sublayers"], ["F5", "A6"]]) != PLAN
    assert (PLAN.ranks, Plan(8).ranks) == (2, None)
    for again in (copy.deepcopy(PLAN), pickle.loads(pickle.dumps(PLAN))):
        assert again == PLAN and again.ranks == 2


def test_it_costs_one_all_reduce_and_is_drawn_with_a_line():
    assert str(PLAN) == "0 [1+2] · A3 [F3 | A4] F4 A5 [F5 A6] F6 · 7"
    assert PLAN.all_reduces == 16 - 2 - 1 - 1
    span = Plan.staggered(30, 14, 27, ranks=3)
    assert str(span) == ("0 1 … 13 · A14 [F14 | A15] [F15 | A16] … [F26 | A27] F27 · 28 29")


def test_files(tmp_path):
    PLAN.to_yaml(tmp_path / "plan.yaml")
    assert Plan.from_yaml(tmp_path / "plan.yaml") == PLAN
    (tmp_path / "plan.yaml").write_text(
        "num_layers: 8\ngroups: [[1, 2]]\nstages: [[F5, A6], {local: 2, sublayers: [F3, A4]}]\n"
    )
    assert Plan.from_yaml(tmp_path / "plan.yaml") == PLAN


def test_config_json():
    entries = plan_entries(PLAN, tuple((layer,) for layer in range(7)))
    assert entries["stages"] == [{"sublayers": ["F2", "A3"], "local": 2}, ["F4", "A5"]]
    assert plan_of(entries) == PLAN


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([LOCAL | {"local": 1}], "A local stage is for 2 to 1024 tensor-parallel ranks, not 1."),
        ([LOCAL | {"local": "2"}], "ranks, not '2'."),
        ([LOCAL | {"local": True}], "ranks, not True."),
        ([LOCAL | {"local": 10**9}], "ranks, not 1000000000."),
        ([{"local": 2}], "write a rank-local one as {sublayers: [F14, A15], local: 2}."),
        ([LOCAL | {"ranks": 2}], "is not a stage; write a rank-local one as"),
        ([LOCAL | {"sublayers": "F3"}], "is not a stage; write a rank-local one as"),
        (
            [LOCAL, {"sublayers": ["F5", "A6"], "local": 3}],
            "Local stages of a plan are for one number of ranks, not for 2 and 3.",
        ),
        ([LOCAL, ["A4", "F4"]], "A4 is in two stages, [F3 | A4] and [A4 F4]"),
    ],
)
def test_what_is_refused(stages, words):
    with pytest.raises(TruedepthError) as refused:
        Plan.from_dict({"num_layers": 8, "stages": stages})
    assert words in str(refused.value)
