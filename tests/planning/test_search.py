"""The search against measurements of the same plans made another way."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml

import truedepth as td
from truedepth.calibration.windows import calibration_windows
from truedepth.cli import app as cli
from truedepth.cli.plan import parse_loss
from truedepth.planning.scoring import MEASURED_WINDOWS, Scorer
from truedepth.report.search import spans_text

SIZE = {"window": 32, "dtype": torch.float32, "check": 6}


@pytest.fixture
def calibration(prose):
    return td.Calibration(text=[prose], tokens=768, **SIZE)


@pytest.fixture(scope="module")
def trained(make_model, prose, tmp_path_factory):
    """A model that has learnt its text, so that whatever is done to it loses something."""
    loaded = td.load(make_model())
    model, tokenizer = loaded.model, loaded.source.tokenizer
    ids = torch.tensor(tokenizer(prose.read_text())["input_ids"][: 32 * 200]).view(-1, 32)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        batch = ids[torch.randint(len(ids), (16,), generator=generator)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("trained")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_scores_and_losses_are_those_of_whole_models(make_model, calibration, tmp_path):
    """Without refits the search's losses are what converting and evaluating would give."""
    source = td.open_source(make_model())
    found = td.search(source, depth=4, calibration=calibration, calibrate=False, frontier=True)
    assert len(found.scores) == 5
    assert {point.plan.effective_depth for point in found.frontier} == {5, 4, 3}
    windows = _windows(source, calibration)
    for groups, loss in [
        *(([score.group], score.raw) for score in found.scores),
        *((point.plan.groups, point.measured) for point in found.frontier),
    ]:
        out = tmp_path / str(groups)
        td.convert(source, out, td.Plan(6, groups))
        excess, kl = _plainly(source, out, windows)
        assert loss.excess == pytest.approx(excess, abs=2e-5)
        assert loss.kl == pytest.approx(kl, abs=2e-5)
    best = min(
        (p for p in found.frontier if p.plan.effective_depth == 4), key=lambda p: p.measured.kl
    )
    assert found.plan.groups == best.plan.groups
    assert found.loss == best.measured
    assert found.forward_passes > 0


def _windows(source, calibration):
    return calibration_windows(source, calibration, 2, MEASURED_WINDOWS).measured


@torch.no_grad()
def _plainly(source, out, ids):
    logps = [td.load(each).model(ids).logits[:, :-1].log_softmax(-1) for each in (source, out)]
    nlls = [-logp.gather(-1, ids[:, 1:, None]).mean().item() for logp in logps]
    kl = (logps[0].exp() * (logps[0] - logps[1])).sum(-1).mean().item()
    return nlls[1] - nlls[0], kl


def test_refitted_plans_are_what_calibrate_writes(make_model, calibration, tmp_path):
    source = td.open_source(make_model())
    found = td.search(source, pairs=2, calibration=calibration)
    assert found.calibrated
    assert all(score.refitted.kl < score.raw.kl for score in found.scores)
    td.calibrate(source, tmp_path / "out", found.plan, calibration)
    excess, kl = _plainly(source, tmp_path / "out", _windows(source, calibration))
    assert found.loss.excess == pytest.approx(excess, abs=1e-4)
    assert found.loss.kl == pytest.approx(kl, abs=1e-4)


def test_the_same_search_twice(make_model, calibration):
    one, two = (td.search(make_model(), pairs=1, calibration=calibration) for _ in range(2))
    assert (one.plan, one.loss, one.check) == (two.plan, two.loss, two.check)


def test_within_a_loss(trained, calibration):
    """The plan keeps within the loss, and the next depth was tried and does not."""
    all_depths = td.search(trained, pairs=3, calibration=calibration, frontier=True)
    by_depth = {p.plan.effective_depth: p.measured for p in all_depths.frontier}
    limit = max(by_depth[4].excess + by_depth[4].stderr, 0) * 1.2 + 1e-4
    found = td.search(trained, max_loss=limit, calibration=calibration)
    assert found.loss.excess + found.loss.stderr <= limit
    assert found.check.excess <= limit
    shallower = [
        p.measured for p in found.frontier if p.plan.effective_depth < found.plan.effective_depth
    ]
    assert not shallower or any(loss and loss.excess + loss.stderr > limit for loss in shallower)


def test_a_loss_that_no_plan_meets(trained, calibration):
    with pytest.raises(td.TruedepthError, match=r"No plan stays within 1e-09 .* the least excess"):
        td.search(trained, max_loss=1e-9, calibration=calibration)


def test_larger_groups(make_model, calibration):
    found = td.search(make_model(), depth=2, max_group=3, calibration=calibration)
    assert found.plan.groups == ((0, 1, 2), (3, 4, 5))
    assert {len(score.group) for score in found.scores} == {2, 3}


def test_time_that_is_up(make_model, calibration):
    with pytest.raises(td.TruedepthError, match="No fitting plan was measured within 0 minutes"):
        td.search(make_model(), pairs=1, calibration=calibration, budget=0)


def test_a_search_whose_time_is_up_takes_the_best_so_far(make_model, calibration, monkeypatch):
    """The clock jumps over the limit when the first whole plan has been measured."""
    measured = []

    def clock():
        return 4000.0 * bool(measured)  # seconds

    whole = Scorer.whole

    def once(self, plan, *arguments):
        loss = whole(self, plan, *arguments)
        measured.append(plan)
        return loss

    monkeypatch.setattr("truedepth.planning.budget.monotonic", clock)
    monkeypatch.setattr(Scorer, "whole", once)
    found = td.search(make_model(), pairs=1, calibration=calibration, budget=60)
    assert found.stopped
    assert found.plans_measured == len(measured) == 1
    assert found.plan.groups == measured[0].groups


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({}, "one of pairs, depth, max_loss"),
        ({"pairs": 1, "depth": 5}, "one of pairs, depth, max_loss"),
        ({"pairs": 4}, "depth of 2 is out of reach"),
        ({"depth": 6}, "6 layers to 3 to 5"),
        ({"max_loss": 0.0}, "above 0"),
        ({"pairs": 1, "max_group": 1}, "max_group must be at least 2, not 1"),
    ],
)
def test_impossible_goals(make_model, calibration, goal, words):
    with pytest.raises(td.TruedepthError, match=words):
        td.search(make_model(), calibration=calibration, **goal)


def test_losses_in_words():
    assert parse_loss("0.05") == 0.05
    assert parse_loss("5%") == pytest.approx(0.04879, abs=1e-5)


def test_plans_in_a_table():
    assert spans_text(td.Plan(20, [[2, 3], [4, 5], [7, 8], [9, 10, 11], [12, 13, 14]])) == (
        "2-5, 7-8, 9-14 by 3"
    )


def test_the_commands(make_model, prose, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["truedepth", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    files = {name: tmp_path / name for name in ("plan.yaml", "plan.json", "plan.png")}
    model, tokens = make_model(max_position_embeddings=1024), ["--tokens", 2048, "--text", prose]
    shown = run(
        *("plan", model, "-o", files["plan.yaml"], "--pairs", 2, "--frontier", *tokens),
        *("--json", files["plan.json"], "--plot", files["plan.png"]),
    )
    groups = yaml.safe_load(files["plan.yaml"].read_text())["groups"]
    assert len(groups) == 2
    assert "held-out check" in shown
    assert max(map(len, shown.splitlines())) <= 80
    data = json.loads(files["plan.json"].read_text())
    assert data["plan"]["groups"] == groups
    assert [point["effective_depth"] for point in data["frontier"]] == [5, 4, 3]
    assert all(point["measured"] for point in data["frontier"])
    assert files["plan.png"].read_bytes().startswith(b"\x89PNG")

    shown = run("convert", model, tmp_path / "out", "--max-loss", "2000%", *tokens)
    assert "search" in shown
    assert "held-out check" in shown
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["truedepth"]["calibration"]["check"]["excess"] < 3
    assert config["num_hidden_layers"] == 3
