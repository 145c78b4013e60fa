"""The search against measurements of the same plans made another way."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from family_models import locally, options_of, side_by_side, staged
from truedepth.calibration.trajectories import Walk
from truedepth.calibration.windows import calibration_windows
from truedepth.cli.plan import parse_loss
from truedepth.plan.choose import cheapest_plans, plan_of_segments
from truedepth.plan.stages import LocalStage, group_of
from truedepth.planning.candidates import FORMS, form_of, promising
from truedepth.planning.scoring import ALONE_WINDOWS, MEASURED_WINDOWS, Scorer
from truedepth.report.search import effort_text

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


def _windows(source, calibration):
    return calibration_windows(source, calibration, [], MEASURED_WINDOWS).measured


def _losses(original, other, ids):
    """Excess loss and KL of logits, nats per token."""
    logps = [logits[:, :-1].log_softmax(-1) for logits in (original, other)]
    nlls = [-logp.gather(-1, ids[:, 1:, None]).mean().item() for logp in logps]
    kl = (logps[0].exp() * (logps[0] - logps[1])).sum(-1).mean().item()
    return pytest.approx((nlls[1] - nlls[0], kl), abs=2e-5)


@torch.inference_mode()
def _written(source, out, ids):
    """The same for checkpoints."""
    return _losses(*(td.load(each).model(ids).logits for each in (source, out)), ids)


@pytest.mark.parametrize("form", ["auto", "pairs"])
def test_scores_and_losses_are_those_of_whole_models(make_model, calibration, form, tmp_path):
    """Without refits they are what the original's own sub-layers in stages lose."""
    source = td.open_source(make_model())
    found = td.search(
        source,
        all_reduces=8,
        calibration=calibration,
        calibrate=False,
        frontier=True,
        merges=td.Merges(form, max_group=3),
    )
    groups, runs = 5 + 4, 11 + 10
    assert len(found.scores) == groups + (runs if form == "auto" else 0)
    assert [point.plan.all_reduces for point in found.frontier] == (
        [10, 8, 6, 4] if form == "pairs" else [11, 10, 9, 8, 7, 6, 5, 4]
    )
    windows = _windows(source, calibration)
    model = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    original = model(windows).logits
    for plan, loss, count in [
        *((plan_of_segments(6, [s.segment]), s.raw, ALONE_WINDOWS) for s in found.scores),
        *((point.plan, point.measured, MEASURED_WINDOWS) for point in found.frontier),
    ]:
        stages = [list(map(str, stage)) for stage in plan.stages]
        ours = staged(model, windows[:count], stages)
        assert (loss.excess, loss.kl) == _losses(original[:count], ours, windows[:count])
    td.convert(source, tmp_path / "out", found.plan)
    assert (found.loss.excess, found.loss.kl) == _written(source, tmp_path / "out", windows)
    assert found.plan.all_reduces == 8
    assert found.loss == next(p.measured for p in found.frontier if p.plan.all_reduces == 8)
    assert (found.hopeless, found.calibrated) == (0, False)
    assert found.forward_passes > 0


def test_local_stages_are_scored_by_what_ranks_compute_and_chosen_if_they_lose_least(
    make_model, calibration
):
    source = td.open_source(make_model(num_hidden_layers=4))
    options = {"all_reduces": 5, "calibration": calibration, "calibrate": False}
    found = td.search(source, **options, frontier=True, merges=td.Merges(local=2))
    assert {form_of(score.segment) for score in found.scores} == set(FORMS)
    windows = _windows(source, calibration)
    model = AutoModelForCausalLM.from_pretrained(source.path, attn_implementation="eager")
    original = model(windows).logits
    for plan, loss, count in [
        *((plan_of_segments(4, [s.segment]), s.raw, ALONE_WINDOWS) for s in found.scores),
        *((point.plan, point.measured, MEASURED_WINDOWS) for point in found.frontier),
    ]:
        stages = [
            (list if isinstance(stage, LocalStage) else tuple)(map(str, stage))
            for stage in plan.stages
        ]
        ours = locally(model, windows[:count], stages, 2)
        assert (loss.excess, loss.kl) == _losses(original[:count], ours, windows[:count])
    assert any(isinstance(stage, LocalStage) for stage in found.plan.stages)
    assert found.loss.kl < td.search(source, **options).loss.kl


def test_predictions_are_sums_over_merges(make_model, calibration):
    """Of the best plan in any form, and of the best in each form alone."""
    found = td.search(
        make_model(num_hidden_layers=4), depth=2.5, calibration=calibration, calibrate=False
    )
    losses = {score.segment: score.raw for score in found.scores}
    alone = {
        form: cheapest_plans(4, {s: loss.kl for s, loss in losses.items() if form_of(s) == form})
        for form in FORMS
    }
    for point in found.frontier:
        merged = [segment for segment in point.plan.segments if segment in losses]
        assert point.predicted == pytest.approx(sum(losses[each].excess for each in merged))
        stages = point.plan.all_reduces
        assert point.by_form.keys() == {form for form in FORMS if stages in alone[form]}
        for form, excess in point.by_form.items():
            (plan,) = alone[form][stages]
            merged = [segment for segment in plan.segments if segment in losses]
            assert excess == pytest.approx(sum(losses[each].excess for each in merged))
    assert found.frontier[0].by_form.keys() == {"staggered", "blocks"}  # one all-reduce less


@pytest.mark.parametrize("goal", [{"pairs": 2}, {"all_reduces": 9}, {"depth": 3.5}])
def test_refitted_plans_are_what_calibrate_writes(make_model, calibration, goal, tmp_path):
    source = td.open_source(make_model())
    found = td.search(source, calibration=calibration, **goal)
    assert found.calibrated
    assert found.plan.all_reduces == {"pairs": 8, "all_reduces": 9, "depth": 7}[next(iter(goal))]
    assert bool(found.plan.merged) is ("pairs" not in goal)
    refitted = [score for score in found.scores if score.refitted]
    assert sum(s.refitted.kl for s in refitted) < 0.8 * sum(s.raw.kl for s in refitted)
    td.calibrate(source, tmp_path / "out", found.plan, calibration)
    expected = _written(source, tmp_path / "out", _windows(source, calibration))
    assert (found.loss.excess, found.loss.kl) == pytest.approx(expected.expected, abs=1e-4)


@pytest.mark.parametrize("local", [None, 2])
def test_refitted_scores_are_what_calibrating_one_merge_loses(
    make_model, calibration, local, tmp_path
):
    source = td.open_source(make_model())
    merges = td.Merges(local=local)
    found = td.search(source, all_reduces=11, calibration=calibration, merges=merges)
    windows = _windows(source, calibration)[:ALONE_WINDOWS]
    for score in [score for score in found.scores if score.refitted][::4]:
        plan = plan_of_segments(6, [score.segment])
        td.calibrate(source, tmp_path / str(plan), plan, calibration)
        expected = _written(source, tmp_path / str(plan), windows)
        found_ = (score.refitted.excess, score.refitted.kl)
        assert found_ == pytest.approx(expected.expected, abs=1e-4)


def test_what_is_hopeless_as_it_is_is_not_refitted(make_model, calibration, monkeypatch):
    """It counts with the loss that it has as it is."""
    monkeypatch.setattr("truedepth.planning.candidates.HOPELESS", 1.1)
    found = td.search(make_model(), all_reduces=10, calibration=calibration)
    worth = promising(6, {score.segment: score.raw.kl for score in found.scores})
    hopeless = [score for score in found.scores if score.refitted is None]
    assert hopeless == [score for score in found.scores if score.segment not in worth]
    assert 0 < found.hopeless == len(hopeless) < len(found.scores)
    assert (
        f"{len(found.scores)} merges ({found.hopeless} lose too much to be refitted)"
        in effort_text(found)
    )
    raw = {score.segment: score.raw.excess for score in hopeless}
    deepest = found.frontier[-1]
    assert deepest.predicted == pytest.approx(
        sum(
            raw.get(score.segment, score.refitted and score.refitted.excess)
            for score in found.scores
            if score.segment in deepest.plan.segments
        )
    )


@pytest.mark.parametrize("goal", [{"pairs": 1}, {"depth": 5.5}])
def test_the_same_search_twice(make_model, calibration, goal):
    one, two = (td.search(make_model(), calibration=calibration, **goal) for _ in range(2))
    assert (one.plan, one.loss, one.check) == (two.plan, two.loss, two.check)


@pytest.mark.parametrize("form", ["auto", "pairs"])
def test_within_a_loss(trained, calibration, form):
    """The plan keeps within the loss; fewer stages were tried, and do not, or not predicted to."""
    options = {"merges": td.Merges(form), "calibration": calibration}
    everywhere = td.search(trained, all_reduces=8, frontier=True, **options)
    by_stages = {point.plan.all_reduces: point.measured for point in everywhere.frontier}
    limit = max(by_stages[8].excess + by_stages[8].stderr, 0) * 1.2 + 1e-4
    found = td.search(trained, max_loss=limit, **options)
    assert found.max_loss == limit
    assert found.plan.all_reduces <= 8
    assert found.loss.excess + found.loss.stderr <= limit
    assert found.check.excess <= limit
    fewer = [
        point.measured
        for point in found.frontier
        if point.plan.all_reduces < found.plan.all_reduces
    ]
    assert not fewer or any(loss and loss.excess + loss.stderr > limit for loss in fewer)


def test_sublayers_lose_less_than_layers(trained, calibration):
    """At equal numbers of all-reduces, for a choice that may also merge layers."""
    options = {"all_reduces": 8, "calibration": calibration}
    found = [td.search(trained, merges=td.Merges(form), **options) for form in ("auto", "pairs")]
    assert found[0].loss.kl < found[1].loss.kl
    assert not found[1].plan.merged


def test_a_loss_that_no_plan_meets(trained, calibration):
    with pytest.raises(td.TruedepthError, match=r"No plan stays within 1e-09 .* the least excess"):
        td.search(trained, max_loss=1e-9, calibration=calibration)


def test_larger_groups(make_model, calibration):
    found = td.search(make_model(), depth=2, merges=td.Merges("pairs", 3), calibration=calibration)
    assert found.plan.groups == ((0, 1, 2), (3, 4, 5))
    assert {len(group_of(score.segment)) for score in found.scores} == {2, 3}


def test_longer_runs(make_model, calibration):
    """Two stages of a model of two layers: the first and the last sub-layers, cut anywhere."""
    model = make_model(num_hidden_layers=2)
    found = td.search(model, all_reduces=1, merges=td.Merges(max_run=4), calibration=calibration)
    assert found.plan == td.Plan(2, stages=[["A0", "F0", "A1", "F1"]], model=found.plan.model)


@pytest.mark.parametrize("case", ["cohere"])
def test_pairs_of_parallel_layers(make_model, calibration, case):
    """As layers in pairs, also where attention and FFN read one state already."""
    model = make_model(**options_of(case))
    found = td.search(
        model, depth=5, calibration=calibration, merges=td.Merges("pairs"), frontier=True
    )
    assert [point.plan.effective_depth for point in found.frontier] == [5, 4, 3]
    assert found.calibrated and any(score.refitted for score in found.scores)
    windows = _windows(td.open_source(model), calibration)[:ALONE_WINDOWS]
    loaded = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    original = loaded(windows).logits
    for score in found.scores:
        groups = plan_of_segments(6, [score.segment]).groups
        other = side_by_side(loaded, windows, groups, parallel=case == "cohere")
        assert (score.raw.excess, score.raw.kl) == _losses(original, other, windows)


def test_nothing_is_fitted_where_nothing_is_calibrated(make_model, prose):
    """So fewer tokens do than any map has inputs."""
    options = td.Calibration([prose], tokens=64, **SIZE)
    found = td.search(make_model(), all_reduces=11, calibration=options, calibrate=False)
    assert found.plan.all_reduces == 11
    with pytest.raises(td.TruedepthError, match="64 calibration tokens are too few"):
        td.search(make_model(), all_reduces=11, calibration=options)


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


def test_time_that_is_up_before_enough_is_scored(make_model, calibration, monkeypatch):
    """Four merges are known when the clock jumps, and no plan of six stages is made of those."""
    known = []
    monkeypatch.setattr("truedepth.planning.scoring.AT_ONCE", 4)
    monkeypatch.setattr("truedepth.planning.budget.monotonic", lambda: 4000.0 * bool(known))
    losses = Walk.losses
    monkeypatch.setattr(Walk, "losses", lambda *given: known.append(1) or losses(*given))
    with pytest.raises(td.TruedepthError, match="No fitting plan was measured within 60 minutes"):
        td.search(make_model(), all_reduces=6, calibration=calibration, budget=60)
    assert len(known) == 1


GOALS = "one of pairs, depth, all_reduces, max_loss"


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        ({}, GOALS),
        ({"pairs": 1, "depth": 5}, GOALS),
        ({"all_reduces": 10, "max_loss": 1.0}, GOALS),
        ({"pairs": 4}, "4 all-reduces are out of reach (an effective depth of 2): these merges"),
        (
            {"depth": 6, "merges": td.Merges("pairs")},
            "leave 6 to 10 of the model's 12, in steps of 2.",
        ),
        ({"depth": 6}, "12 all-reduces are out of reach (an effective depth of 6): these merges"),
        ({"all_reduces": 13}, "leave 4 to 11 of the model's 12."),
        ({"all_reduces": 3}, "leave 4 to 11 of the model's 12."),
        ({"all_reduces": 1}, "1 all-reduce is out of reach (an effective depth of 0.5)"),
        ({"all_reduces": 9, "merges": td.Merges("pairs")}, "9 all-reduces are out of reach"),
        ({"depth": 4.5, "merges": td.Merges("pairs")}, "9 all-reduces are out of reach"),
        ({"depth": 4.25}, "4.25 is not half a number of stages; give one such as 23 or 22.5."),
        ({"depth": float("inf")}, "inf is not half a number"),
        ({"depth": float("nan")}, "depth must be at least 1, not nan."),
        ({"max_loss": 0.0}, "above 0"),
    ],
)
def test_impossible_goals(make_model, goal, words):
    """Refused before any text is read or written."""
    with pytest.raises(td.TruedepthError, match=re.escape(words)) as refused:
        td.search(make_model(), calibration=td.Calibration(["/nowhere.txt"]), **goal)
    assert refused.value.exit_code == 2


def test_one_layer_has_no_pairs(make_model):
    with pytest.raises(td.TruedepthError, match="has one layer, and no two can run together"):
        td.search(make_model(num_hidden_layers=1), max_loss=1.0, merges=td.Merges("pairs"))


def test_losses_in_words():
    assert parse_loss("0.05") == 0.05
    assert parse_loss("5%") == pytest.approx(0.04879, abs=1e-5)


def test_plan_writes_a_plan_a_table_a_picture_and_json(run, make_model, prose, tmp_path):
    model = make_model()
    words = [model, "--text", prose, "--tokens", 1024, "--frontier", "--max-group", 3]
    words += ["--window", 64]
    files = ["-o", tmp_path / "p.yaml", "--json", tmp_path / "p.json", "--plot", tmp_path / "p.svg"]
    code, shown, err = run("plan", *words, *files, "--all-reduces", 9)
    assert code == 0, err
    assert max(map(len, shown.splitlines())) <= 80
    assert "held-out check" in shown
    plan = td.Plan.from_yaml(tmp_path / "p.yaml")
    assert (plan.num_layers, plan.all_reduces, plan.model) == (6, 9, td.open_source(model).name)
    data = json.loads((tmp_path / "p.json").read_text())
    assert td.Plan.from_dict(data["plan"]) == plan
    assert [point["all_reduces"] for point in data["frontier"]] == [11, 10, 9, 8, 7, 6, 5, 4]
    assert all(point["measured"] for point in data["frontier"])
    for point in data["frontier"]:
        read = td.Plan.from_dict(
            {"num_layers": 6, "groups": point["groups"], "stages": point["stages"]}
        )
        assert read.all_reduces == 2 * point["effective_depth"] == point["all_reduces"]
    assert len(data["scores"]) == 30
    assert ["A0 A1", "F0 F1"] in [
        [" ".join(s) for s in score["merged"]] for score in data["scores"]
    ]
    _, _, table = shown.partition("whole plans lose:\n\n")
    header, *rows = table.splitlines()
    titles = ["stages", "pairs", "staggered", "blocks", "runs", "refitted"]
    assert header.split() == [*titles, "measured", "KL"]
    for row, point in zip(rows, data["frontier"], strict=True):
        cells = row.replace(" ± ", "±").split()
        forms = [point["by_form"].get(form) for form in titles[1:5]]
        assert cells[:6] == [
            str(point["all_reduces"]),
            *("-" if each is None else f"{each:.3f}" for each in forms),
            f"{point['predicted']:.3f}",
        ]
        assert cells[6].startswith(f"{point['measured']['excess']:.4f}±")
        assert cells[7] == f"{point['measured']['kl']:.3f}"
    picture = (tmp_path / "p.svg").read_text()
    for words in ("all-reduces per token", "excess loss", *titles[1:], "held-out text"):
        assert words in picture


def test_plan_of_pairs_shows_their_column_alone(run, make_model, prose, tmp_path):
    words = [make_model(), "--text", prose, "--tokens", 1024, "--window", 64]
    for how in (["--pairs", 2], ["--form", "pairs", "--depth", 4]):
        code, shown, err = run("plan", *words, "-o", tmp_path / "p.yaml", *how)
        assert code == 0, err
        (header,) = (line for line in shown.splitlines() if line.endswith("KL"))
        assert header.split() == ["stages", "pairs", "refitted", "measured", "KL"]
        plan = td.Plan.from_yaml(tmp_path / "p.yaml")
        assert (plan.effective_depth, plan.merged) == (4, ())


@pytest.mark.parametrize("goal", [["--max-loss", "2000%"], ["--depth", "2.5"]])
def test_convert_searches(run, make_model, prose, tmp_path, goal):
    model = make_model()
    words = [model, tmp_path / "out", *goal, "--tokens", 1024, "--text", prose, "--window", 64]
    code, shown, err = run("convert", *words, "--json", tmp_path / "j")
    assert code == 0, err
    assert re.search(r"search +26 merges", shown)
    assert "held-out check" in shown
    assert max(map(len, shown.splitlines())) <= 80
    config = json.loads((tmp_path / "out" / "config.json").read_text())["truedepth"]
    assert config["calibration"]["check"]["excess"] < 3
    plan = td.Plan.from_dict(config["plan"])
    assert plan == td.Plan.from_dict(json.loads((tmp_path / "j").read_text())["search"]["plan"])
    assert plan.all_reduces == (4 if goal[0] == "--max-loss" else 5)


def test_convert_says_where_there_is_nothing_to_calibrate(run, make_model, prose, tmp_path):
    model = make_model(**options_of("gemma2"))
    words = ["--pairs", 1, "--text", prose, "--tokens", 2048, "--window", 64]
    code, shown, err = run("convert", model, tmp_path / "out", *words)
    assert code == 0, err
    notes = [line for line in err.splitlines() if line.startswith("truedepth: note: ")]
    assert "nothing of the plan can be calibrated" in notes[-1]
    assert "calibrated" not in shown


def test_the_fastest_plan_within_a_loss(trained, calibration):
    """A pair saves much, a staggered stage little, a block nothing: it is not considered."""
    saves = {"pairs": 5.0, "staggered": 1.0, "blocks": 0.0, "runs": 2.0}

    def seconds(plan):
        return 100.0 - sum(saves[form_of(each)] for each in plan.segments if each[0][1:])

    limit = 0.3
    found = td.search(
        trained, max_loss=limit, calibrate=False, calibration=calibration, seconds=seconds
    )
    assert {form_of(score.segment) for score in found.scores} == {"pairs", "staggered", "runs"}
    assert found.loss.excess <= limit
    assert found.check.excess <= limit
    fewest = td.search(trained, max_loss=limit, calibrate=False, calibration=calibration)
    assert seconds(found.plan) <= seconds(fewest.plan)
    with pytest.raises(td.TruedepthError, match="No merge saves time there"):
        td.search(trained, max_loss=limit, calibration=calibration, seconds=lambda plan: 1.0)
