"""`plan --for`: the fastest plan over a link."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import truedepth as td
from truedepth.speed import prediction
from truedepth.speed.layer_timing import LayerTimes
from truedepth.speed.links import parse_link
from truedepth.speed.prediction import seconds_of_plans

TIMES = LayerTimes({1: 1e-3, 2: 1.6e-3}, weights=5e-4, rest=2e-3, all_reduce=0.0, bandwidth=1e9)


@pytest.fixture
def timed(monkeypatch):
    """What would be timed; layers take `TIMES`, and sub-layers that share a stage 0.1 ms less."""
    seen = []
    times = replace(TIMES, shared=-1e-4)
    monkeypatch.setattr(prediction, "layer_times", lambda *_, **more: seen.append(more) or times)
    return seen


def test_seconds_of_plans(make_model, timed):
    """Groups save kernels, stages of several too, local ones all-reduces alone."""
    source = td.open_source(make_model())
    device = seconds_of_plans(source, device="cpu")
    assert device(td.Plan(6)) == pytest.approx(6e-3 + 2e-3)
    assert device(td.Plan(6, [[1, 2]])) == pytest.approx(4e-3 + 1.6e-3 + 2e-3)
    assert device(td.Plan.staggered(6, 2, 5)) == pytest.approx(6e-3 - 3e-4 + 2e-3)
    assert device(td.Plan.staggered(6, 2, 5, ranks=2)) == device(td.Plan(6))
    link = seconds_of_plans(source, ranks=2, link=parse_link("1000,1"), device="cpu")
    saved = link(td.Plan(6)) - link(td.Plan.staggered(6, 2, 5, ranks=2))
    assert saved == pytest.approx(3 * 1e-3, rel=1e-2)
    assert len(timed) == 2
    assert all(each["fused"] and each["staggered"] for each in timed)


def test_a_plan_for_a_link(run, make_model, prose, tmp_path, timed):
    out = tmp_path / "plan.yaml"
    options = ["--max-loss", "9", "--no-calibrate", "--text", prose, "--tokens", "768"]
    options += ["--window", "32"]
    found = tmp_path / "plan.json"
    wire = ["--for", "1000,1", "--tp", "2", "--json", found]
    code, said, _ = run("plan", make_model(), "-o", out, *options, *wire)
    assert code == 0
    assert "\nPredicted time per token for 1000,1, stages fused" in said
    told = json.loads(found.read_text())
    assert (told["for"], told["tp"]) == ("1000,1", 2)
    assert f"\n{told['time_before'] * 1e3:.3f} -> {told['time_after'] * 1e3:.3f} ms" in said
    times = {each["all_reduces"]: each["time"] for each in told["frontier"]}
    assert times[4] == told["time_after"] == min(times.values())
    assert times[4] == pytest.approx(told["time_before"] - 8 * 1e-3, abs=1e-3)
    over_a_wire = td.Plan.from_yaml(out).all_reduces
    code, said, _ = run("plan", make_model(), "-o", out, *options, "--for", "device")
    assert code == 0
    assert "\nPredicted time per token for device, stages fused" in said
    assert over_a_wire == 4
    assert td.Plan.from_yaml(out).groups == ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-loss", "1", "--for", "usb", "--tp", "2"], "A link is one of nvlink-custom, "),
        (["--max-loss", "1", "--for", "usb", "--tp", "2"], ", or device for one device; not 'usb'"),
        (["--max-loss", "1", "--tp", "2"], "--tp N goes with --local or with --for LINK."),
        (["--max-loss", "1", "--for", "device", "--device", "cuda:99"], "no device 'cuda:99'"),
        (["--max-loss", "1", "--device", "cuda:99"], "no device 'cuda:99'"),
        (["--max-loss", "1", "--for", "nvlink"], "--for LINK goes with --tp N"),
        (["--max-loss", "1", "--for", "device", "--tp", "2"], "--for device goes without"),
        (["--all-reduces", "9", "--for", "device"], "--for goes with --max-loss"),
    ],
)
def test_what_for_needs(run, make_model, tmp_path, options, words):
    code, out, err = run("plan", make_model(), "-o", tmp_path / "plan.yaml", *options)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tp", "4", "--local"], "has 4 heads and 2 KV heads, which are not divisible by 4"),
        (["--tp", "2", "--text", "none.txt"], "none.txt"),
    ],
)
def test_what_is_wrong_is_said_before_layers_are_timed(
    run, make_model, tmp_path, timed, options, words
):
    command = ["plan", make_model(), "-o", tmp_path / "plan.yaml", "--max-loss", "1"]
    code, out, err = run(*command, "--for", "1000,1", *options)
    assert (code, out) == (2, "")
    assert words in err
    assert not timed
