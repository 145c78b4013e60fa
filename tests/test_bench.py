"""Timing runs, and models over ranks. No test here depends on how long anything takes."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import truedepth as td
from truedepth.bench import Case, Task, interleaved
from truedepth.engines.transformers import measure
from truedepth.ranks import run_ranks

CASES = [Case(task, length=12, batch=2) for task in Task]
PLAN = td.Plan(6, [[1, 2], [3, 4]])


class Noted:
    def __init__(self, name, notes, seconds):
        self.name, self.notes, self.taken = name, notes, iter(seconds)

    def seconds(self, case):
        self.notes.append(self.name)
        return next(self.taken)

    def collectives(self, case):
        return None


def test_runs_alternate_and_ratios_are_of_medians():
    notes = []
    base, model = Noted("A", notes, [9, 4, 6, 8]), Noted("B", notes, [9, 2, 3, 1])
    (row,) = interleaved(model, base, CASES[:1], repetitions=3, warmups=1)
    assert notes == ["A", "B"] * 4
    assert row.base.seconds == (4, 6, 8)
    assert row.speedup == 6 / 2
    assert row.speedups == (2, 2, 8)


def test_one_process(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    rows = measure(str(tmp_path / "out"), str(make_model()), CASES, 2, 1, "cpu", None)
    assert [row.case for row in rows] == CASES
    for row in rows:
        assert len(row.model.seconds) == len(row.base.seconds) == 2
        assert row.model.collectives is None


def test_two_ranks(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    rows = measure(str(tmp_path / "out"), str(make_model()), CASES, 2, 2, "cpu", None)
    for row in rows:
        passes = row.case.length if row.case.task is Task.generate else 1
        before, after = row.base.collectives, row.model.collectives
        saved = before.calls["all_reduce"] - after.calls["all_reduce"]
        assert saved == passes * 2 * (6 - PLAN.effective_depth)
        assert before.calls["all_gather"] == after.calls["all_gather"] == passes
        tokens = 2 * (row.case.length if row.case.task is Task.prefill else 1)
        assert before.bytes - after.bytes == saved * tokens * 64 * 4
        assert 0 < after.share < 1


def test_heads_that_do_not_divide(make_model):
    odd = str(make_model(num_attention_heads=4, num_key_value_heads=1))
    with pytest.raises(td.TruedepthError, match=r"1 KV heads, .* by 2 ranks; .* --pad-heads 2"):
        measure(odd, None, CASES, 1, 2, "cpu", None)


def fail_in_one(word):
    if dist.get_rank() == 1:
        raise ValueError(f"no {word}")
    dist.barrier()


def test_one_rank_that_fails_ends_the_others():
    with pytest.raises(td.TruedepthError, match=r"^Rank 1: ValueError: no luck"):
        run_ranks(2, fail_in_one, "luck")
