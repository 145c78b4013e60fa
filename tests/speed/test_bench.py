"""Timing runs, and models over ranks. No test here depends on how fast anything is."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

import truedepth as td
from truedepth import progress
from truedepth.speed import transformers
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import DECODED, Case, Task, interleaved
from truedepth.speed.transformers import TimedTransformersModel

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


def bench(model, base=None, ranks=1, **options):
    found = td.bench(
        model,
        against=base,
        lengths=[12],
        batches=[2],
        ranks=ranks,
        repetitions=2,
        device="cpu",
        dtype=torch.float32,
        **options,
    )
    assert [row.case for row in found.rows] == CASES
    return found.rows


def test_one_process(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    for row in bench(tmp_path / "out", make_model()):
        assert len(row.model.seconds) == len(row.base.seconds) == 2
        assert row.model.collectives is None


def test_both_models_are_fused(make_model, monkeypatch):
    fused = []
    monkeypatch.setattr(transformers, "fuse", lambda model: fused.append(model) or model)
    bench(make_model(), make_model(), fuse=True)
    assert len(fused) == 2
    bench(make_model())
    assert len(fused) == 2


def test_lengths_beyond_the_positions_are_said(make_model, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_noted", set())
    model = make_model(max_position_embeddings=8)
    bench(model, make_model())
    said = f"truedepth: note: 12 tokens are more than the 8 positions of {model}.\n"
    assert capsys.readouterr().err == said


def test_two_ranks(make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", PLAN)
    for row in bench(tmp_path / "out", make_model(), ranks=2):
        passes = row.case.length if row.case.task is Task.generate else 1
        before, after = row.base.collectives, row.model.collectives
        assert after.calls["all_reduce"] in (passes * 8, passes * 9)  # and a tied embedding's
        saved = before.calls["all_reduce"] - after.calls["all_reduce"]
        assert saved == passes * 2 * (6 - PLAN.effective_depth)
        assert before.calls["all_gather"] == after.calls["all_gather"] == passes
        tokens = 2 * (row.case.length if row.case.task is Task.prefill else 1)
        assert before.bytes - after.bytes == saved * tokens * 64 * 4
        assert 0 < after.share < 1


@pytest.mark.parametrize("fuse", [False, True])
def test_a_stage_costs_one_all_reduce(make_model, tmp_path, fuse):
    plan = td.Plan(6, stages=[["F0", "A1"], ["F1", "A2"], ["A4", "F4", "A5"]])
    td.convert(make_model(), tmp_path / "out", plan)
    assert plan.all_reduces == 8
    for row in bench(tmp_path / "out", make_model(), ranks=2, fuse=fuse):
        passes = row.case.length if row.case.task is Task.generate else 1
        before, after = row.base.collectives, row.model.collectives
        assert before.calls["all_reduce"] - after.calls["all_reduce"] == passes * (12 - 8)
        assert before.calls["all_gather"] == after.calls["all_gather"] == passes


def test_a_decoded_token_is_a_share_of_a_run(make_model, monkeypatch):
    monkeypatch.setattr(transformers, "stopwatch", lambda steps, device: (steps(), 8.0)[1])
    timed = transformers.TimedTransformersModel(td.load(make_model()).model)
    times = {task: timed.seconds(Case(task, 4)) for task in Task}
    assert times == {Task.prefill: 8.0, Task.generate: 8.0, Task.decode: 8.0 / DECODED}


@pytest.mark.slow  # compiling takes a minute
def test_compiled_steps_give_the_tokens_of_eager_ones(make_model, tmp_path, monkeypatch):
    td.convert(make_model(), tmp_path / "out", PLAN)
    model = td.load(tmp_path / "out").model
    cases = [CASES[1], CASES[2], CASES[2], CASES[1]]
    eager, compiled = [], []

    def step_by_step(_, inputs):
        if inputs[0].shape[1] == 1:
            eager.append(inputs[0].clone())

    with model.register_forward_pre_hook(step_by_step):
        timed = TimedTransformersModel(model, False)
        for case in cases:
            timed.seconds(case)

    def compile_and_note(model, **options):
        step = torch_compile(model, **options)
        return lambda token, **inputs: compiled.append(token.clone()) or step(token, **inputs)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_and_note)
    timed = TimedTransformersModel(model, True)
    for case in cases:
        timed.seconds(case)
    assert torch.equal(torch.cat(eager, 1), torch.cat(compiled, 1))


def test_heads_that_do_not_divide(make_model):
    odd = make_model(num_attention_heads=4, num_key_value_heads=1)
    with pytest.raises(td.TruedepthError, match=r"1 KV heads, .* by 2 ranks; .* --pad-heads 2"):
        bench(odd, ranks=2)


def test_lengths_of_nothing(make_model):
    with pytest.raises(td.TruedepthError, match="lengths must be at least 1, not 0"):
        td.bench(make_model(), lengths=[0])


def fail_in_one(word):
    if dist.get_rank() == 1:
        raise ValueError(f"no {word}")
    dist.barrier()


def test_one_rank_that_fails_ends_the_others():
    with pytest.raises(td.TruedepthError, match=r"^Rank 1: ValueError: no luck"):
        run_ranks(2, fail_in_one, "luck")


def die_in_one(others_wait):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if others_wait:  # where no message reaches them
        time.sleep(3600)
    dist.barrier()


@pytest.mark.parametrize("others_wait", [False, True])
def test_one_rank_that_is_killed_ends_the_others(others_wait):
    """As a system without memory does: it is named, not those who missed it."""
    start = time.monotonic()
    with pytest.raises(td.TruedepthError, match=r"^Rank 1: .*SIGKILL"):
        run_ranks(2, die_in_one, others_wait)
    assert time.monotonic() - start < 600
