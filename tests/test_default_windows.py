"""Models of few positions, and windows that nobody asked for: as many tokens as there are."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import truedepth as td
from truedepth.calibration.windows import calibration_windows
from truedepth.healing.options import Healing, TextPart
from truedepth.healing.run import heal

LAYERS = 4
PLAN = td.Plan(LAYERS, [[1, 2]])
FEW = {"num_hidden_layers": LAYERS}
BEYOND = "A window of {} tokens is longer than the {} positions of .*; use windows of at most {}"


@pytest.fixture(params=[64, 256], ids="{} positions".format)
def positions(request):
    return request.param


@pytest.fixture
def short(make_model, positions):
    return make_model(max_position_embeddings=positions, **FEW)


@pytest.fixture
def calibration(prose):
    return td.Calibration(text=[prose], own_text=0.0, tokens=1536, check=2, dtype=torch.float32)


@pytest.fixture
def healing(prose, positions):
    return Healing(
        text=[TextPart(str(prose))],
        tokens=2 * positions,
        validation=1,
        batch_size=2,
        micro_batch_size=2,
        device="cpu",
    )


def test_search(short, positions, calibration):
    found = td.search(short, pairs=1, calibration=calibration)
    assert found.check.tokens == 2 * (positions - 1)  # the first of a window is not predicted
    assert found.loss.tokens % (positions - 1) == 0


def test_calibrate_and_heal(short, positions, calibration, healing, tmp_path):
    td.calibrate(short, tmp_path / "wide", PLAN, replace(calibration, own_text=0.25))
    written = json.loads((tmp_path / "wide/config.json").read_text())["truedepth"]["calibration"]
    assert (written["window"], written["tokens"]) == (positions, 1536)
    done = heal(tmp_path / "wide", tmp_path / "healed", teacher=short, healing=healing)
    written = json.loads((tmp_path / "healed/config.json").read_text())["truedepth"]["healing"]
    assert written["sequence_length"] == positions
    assert done.tokens == healing.tokens


def test_perplexity(short, positions, prose):
    measured = td.perplexity(short, text=prose, windows=2)
    assert measured == td.perplexity(short, text=prose, windows=2, window=positions)
    assert measured.tokens == 2 * (positions - 1)


def test_perplexity_against_a_model_of_more_positions(make_model, prose):
    models = [make_model(max_position_embeddings=n, **FEW) for n in (512, 64)]
    measured = td.perplexity(models[0], against=models[1], text=prose, windows=2)
    assert measured.window == 64


def test_study(short, positions, prose, tmp_path):
    found = td.study(short, tmp_path, text=prose, windows=2, transformations=["prune"])
    assert found.settings["window"] == positions


def test_no_more_than_the_usual_window(make_model, calibration):
    source = td.open_source(make_model(max_position_embeddings=2048, **FEW))
    assert calibration_windows(source, calibration, []).window == 512
    with pytest.raises(td.TruedepthError, match="600 calibration tokens are too few: two windows"):
        calibration_windows(source, replace(calibration, tokens=600), [])


def test_windows_beyond_the_positions(short, positions, calibration, healing, prose, tmp_path):
    td.convert(short, tmp_path / "wide", PLAN)
    long = positions + 1
    options = replace(calibration, window=long)
    taught = replace(healing, sequence_length=long, tokens=1 << 14)
    for call in (
        lambda: td.search(short, pairs=1, calibration=options),
        lambda: td.calibrate(short, tmp_path / "out", PLAN, options),
        lambda: td.perplexity(short, text=prose, window=long),
        lambda: td.study(short, tmp_path / "out", text=prose, window=long),
        lambda: heal(tmp_path / "wide", tmp_path / "out", teacher=short, healing=taught),
    ):
        with pytest.raises(td.TruedepthError, match=BEYOND.format(long, positions, positions)):
            call()


def test_the_command_line(run, make_model, prose, tmp_path):
    model = make_model(max_position_embeddings=64, **FEW)
    text = ("--text", prose, "--dtype", "float32", "--own-text", 0, "--tokens", 1024)
    plan = ("plan", model, "--pairs", 1, "--out", tmp_path / "plan.yaml", *text)
    code, _, said = run(*plan, "--window", 65)
    assert (code, "64 positions" in said) == (2, True)
    assert run(*plan)[0] == 0
    convert = ("convert", model, tmp_path / "out", "--plan", tmp_path / "plan.yaml")
    code, _, said = run(*convert, "--window", 32)
    assert (code, said.strip()) == (2, "truedepth: --window goes with --calibrate.")
    assert run(*convert, "--calibrate", *text, "--window", 32)[0] == 0
    written = json.loads((tmp_path / "out/config.json").read_text())["truedepth"]
    assert written["calibration"]["window"] == 32
