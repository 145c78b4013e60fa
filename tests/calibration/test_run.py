"""Calibrated checkpoints: what is written, kept after a kill, and refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import forks
import truedepth as td
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.windows import calibration_windows
from truedepth.cli import app as cli
from truedepth.plan.stages import group_segment

PLAN = td.Plan(6, [[1, 2], [4, 5]])
PAIR = [group_segment((1, 2))]
SIZE = {"tokens": 768, "window": 32, "dtype": torch.float32}


@pytest.fixture
def options(prose):
    return td.Calibration(text=[prose], **SIZE)


def test_it_is_the_uncalibrated_checkpoint_with_other_values(make_model, options, tmp_path, prose):
    model = make_model()
    td.convert(model, tmp_path / "raw", PLAN)
    td.calibrate(model, tmp_path / "out", PLAN, options)
    raw, out = (load_file(tmp_path / name / "model.safetensors") for name in ("raw", "out"))
    assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
        k: (v.shape, v.dtype) for k, v in raw.items()
    }
    same = {name for name in raw if torch.equal(raw[name], out[name])}
    outside = {n for n in raw if not n.startswith(("model.layers.1.", "model.layers.3."))}
    assert outside <= same
    assert len(raw) - len(same) > 8
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("raw", "out")]
    record = configs[1]["truedepth"].pop("calibration")
    assert configs[0]["truedepth"].pop("calibration") is None
    assert configs[0] == configs[1]
    assert (record["tokens"], record["text"]) == (768, ["text.txt"])
    assert list(record["held_out_errors"]) == ["1+2", "4+5"]
    assert "refitted" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "out"}
    losses = {
        name: td.perplexity(tmp_path / name, against=model, text=prose, window=32).kl
        for name in ("raw", "out")
    }
    assert losses["out"] < 0.7 * losses["raw"]


def test_the_same_call_gives_the_same_weights(make_model, options, tmp_path):
    for name in ("one", "two"):
        td.calibrate(make_model(), tmp_path / name, PLAN, options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_calibration_goes_on_where_it_was(make_model, prose, options, tmp_path):
    td.calibrate(make_model(), tmp_path / "whole", PLAN, options)
    code = (
        "import sys, os, torch, truedepth as td\n"
        "from truedepth.calibration.refit import Calibrator\n"
        "refit = Calibrator.refit\n"
        "def once(self, segment):\n"
        "    if segment[0][0].layer == 4: os.kill(os.getpid(), 9)\n"
        "    return refit(self, segment)\n"
        "Calibrator.refit = once\n"
        "td.calibrate(sys.argv[1], sys.argv[2], td.Plan(6, [[1, 2], [4, 5]]), td.Calibration(\n"
        "    text=[sys.argv[3]], tokens=768, window=32, dtype=torch.float32))"
    )
    assert forks.python(code, make_model(), tmp_path / "out", prose).returncode == -9
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.calibration"
    (file,) = kept.glob("segment-*")
    assert file.name == "segment-0002.safetensors"  # behind A0 and F0
    before = file.stat().st_mtime_ns

    seen = []
    refit = Calibrator.refit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Calibrator,
            "refit",
            lambda self, segment: (
                seen.append((segment, file.stat().st_mtime_ns)) or refit(self, segment)
            ),
        )
        td.calibrate(make_model(), tmp_path / "out", PLAN, options)
    assert seen == [(group_segment((4, 5)), before)]
    whole, out = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(whole[name], out[name]) for name in whole)
    assert not kept.exists()


def test_layers_of_another_calibration_are_not_used(make_model, options, tmp_path, monkeypatch):
    kept = tmp_path / ".out.calibration"
    kept.mkdir()
    (kept / "settings.json").write_text("{}")
    (kept / "segment-0002.safetensors").write_bytes(b"another's")
    td.calibrate(make_model(), tmp_path / "out", PLAN, options)
    td.calibrate(make_model(), tmp_path / "other", PLAN, options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_every_file_has_its_share_of_the_tokens(make_model, prose, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("a cat " * 60)
    source = td.open_source(make_model())
    cut = SIZE | {"check": 2}
    found = calibration_windows(source, td.Calibration(text=[prose, short], **cut), PAIR, 3)
    assert [len(part) for part in (found.fitted, found.measured, found.check)] == [24, 3, 2]
    found = calibration_windows(source, td.Calibration(text=[prose], **cut), PAIR, 3)
    uses = [set(map(tuple, part.tolist())) for part in (found.fitted, found.measured, found.check)]
    assert not (uses[0] & uses[1] or uses[0] & uses[2] or uses[1] & uses[2])


def test_what_a_short_file_lacks_the_others_give(make_model, tmp_path):
    """Windows of three files, each of a word of its own."""
    source = td.open_source(make_model())
    words = {"cat": 4000, "mat": 200, "hat": 2000}
    for word, times in words.items():
        (tmp_path / f"{word}.txt").write_text(f"{word} " * times)
    texts = [tmp_path / f"{word}.txt" for word in words]
    options = td.Calibration(text=texts, tokens=32 * 60, window=32, check=0)
    fitted = calibration_windows(source, options, PAIR).fitted
    decoded = [source.tokenizer.decode(window) for window in fitted]
    shares = {word: sum(word in text for text in decoded) for word in words}
    short = (200 * len(source.tokenizer(" mat")["input_ids"])) // 32
    assert sum(shares.values()) == len(fitted) == 60
    assert shares["mat"] <= short < 20
    assert abs(shares["cat"] - shares["hat"]) <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": 160}, "160 calibration tokens are too few: the widest map has 192 inputs"),
        ({"tokens": 63}, "two windows of 32 are the least"),
        ({"own_text": 1.5}, "from 0 to 1, not 1.5"),
        ({"window": 1024, "tokens": 4096}, "longer than the 512 positions"),
    ],
)
def test_bad_amounts(make_model, prose, tmp_path, change, words):
    with pytest.raises(td.TruedepthError, match=words):
        td.calibrate(make_model(), tmp_path / "o", PLAN, td.Calibration([prose], **SIZE | change))
    assert not list(tmp_path.iterdir())


def test_text_without_tokens(make_model, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(td.TruedepthError, match=r"blank\.txt is empty"):
        td.calibrate(make_model(), tmp_path / "o", PLAN, td.Calibration([tmp_path / "blank.txt"]))


def test_the_command(make_model, prose, tmp_path, monkeypatch, capsys):
    arguments = ["convert", make_model(), tmp_path / "out", "--layers", "1-4", "--calibrate"]
    arguments += ["--text", prose, "--tokens", 1024, "--workspace", tmp_path]
    monkeypatch.setattr(sys, "argv", ["truedepth", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "calibrated" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["truedepth"]["calibration"]["tokens"] == 1024
