"""Calibrated checkpoints: what is written, kept after a kill, and refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import forks
import truedepth as td
from family_models import options_of, staged
from tiny_models import random_ids
from truedepth.calibration.refit import Calibrator
from truedepth.calibration.windows import calibration_windows, tokens_needed
from truedepth.cli import app as cli
from truedepth.plan.stages import group_segment

PLAN = td.Plan(6, [[1, 2], [4, 5]])
STAGES = td.Plan(6, stages=[["F2", "A3"], ["A4", "F4", "A5"]])
MIXED = td.Plan(6, [[1, 2]], stages=[["F3", "A4"], ["A5", "F5"]])
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


@pytest.mark.parametrize("name", ["llama", "phi3", "starcoder2"])
def test_calibrated_stages_compute_what_their_weights_say(make_model, options, name, tmp_path):
    """Tensors keep the original's names, so that its own layers, staged, are the reference."""
    model = make_model(**options_of(name))
    done = td.calibrate(model, tmp_path / "out", STAGES, options)
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    tensors = original.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {
        k: (tensors[k].shape, tensors[k].dtype) for k in written
    }
    changed = {k for k, tensor in written.items() if not torch.equal(tensor, tensors[k])}
    merged = ("2.mlp.", "2.post_attention", "3.self_attn.", "3.input", "4.", "5.self_attn.", "5.in")
    assert changed and all(k.removeprefix("model.layers.").startswith(merged) for k in changed)
    assert not any("norm" in k or k.endswith("bias") for k in changed)
    original.load_state_dict(written, strict=False)
    ids = random_ids()
    expected = staged(original, ids, [list(map(str, stage)) for stage in STAGES.stages])
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.inference_mode():
        torch.testing.assert_close(out(ids).logits, expected, atol=1e-4, rtol=0)
    record = json.loads((tmp_path / "out" / "config.json").read_text())["truedepth"]["calibration"]
    assert record["held_out_errors"].keys() == {"F2 A3", "A4 F4 A5"}
    for stage, errors in record["held_out_errors"].items():
        writes = [name for name in errors if name.count("of layer") == len(stage.split())]
        assert (len(errors), len(writes)) == (len(stage.split()) + 1, 1)
        assert all(each["after"] <= each["before"] for each in errors.values())
    assert done.calibration.check.excess == pytest.approx(record["check"]["excess"])


def test_calibrated_stages_lose_less(make_model, options, tmp_path, prose):
    td.convert(make_model(), tmp_path / "raw", STAGES)
    td.calibrate(make_model(), tmp_path / "out", STAGES, options)
    raw, out = (
        td.perplexity(tmp_path / name, against=make_model(), text=prose, window=32).kl
        for name in ("raw", "out")
    )
    assert out < 0.8 * raw


def test_the_same_call_gives_the_same_weights(make_model, options, tmp_path):
    for name in ("one", "two"):
        td.calibrate(make_model(), tmp_path / name, PLAN, options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("plan", "first", "last", "kept_files"),
    [
        (PLAN, 4, group_segment((4, 5)), [2]),
        (MIXED, 5, MIXED.segments[-1], [2, 4]),
        (STAGES, 4, STAGES.segments[-2], [5]),
    ],
    ids=str,
)
def test_a_killed_calibration_goes_on_where_it_was(
    make_model, prose, options, tmp_path, plan, first, last, kept_files
):
    """Killed when it comes to the last merged segment, which begins with a layer's attention."""
    td.calibrate(make_model(), tmp_path / "whole", plan, options)
    plan.to_yaml(tmp_path / "plan.yaml")
    code = (
        "import sys, os, torch, truedepth as td\n"
        "from truedepth.calibration.refit import Calibrator\n"
        "refit = Calibrator.refit\n"
        "def once(self, segment):\n"
        "    first = segment[0][0]\n"
        f"    if (first.layer, first.kind) == ({first}, 'attention'): os.kill(os.getpid(), 9)\n"
        "    return refit(self, segment)\n"
        "Calibrator.refit = once\n"
        "td.calibrate(sys.argv[1], sys.argv[2], td.Plan.from_yaml(sys.argv[4]), td.Calibration(\n"
        "    text=[sys.argv[3]], tokens=768, window=32, dtype=torch.float32))"
    )
    given = (make_model(), tmp_path / "out", prose, tmp_path / "plan.yaml")
    assert forks.python(code, *given).returncode == -9
    assert not (tmp_path / "out").exists()
    kept = tmp_path / ".out.calibration"
    files = sorted(kept.glob("segment-*"))  # A0 is segment 0, F0 is 1
    assert [file.name for file in files] == [f"segment-{n:04d}.safetensors" for n in kept_files]

    def times():
        return [file.stat().st_mtime_ns for file in files]

    before = times()

    seen = []
    refit = Calibrator.refit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Calibrator,
            "refit",
            lambda self, segment: seen.append((segment, times())) or refit(self, segment),
        )
        td.calibrate(make_model(), tmp_path / "out", plan, options)
    assert seen == [(last, before)]
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


def test_the_widest_map_of_a_stage_joins_what_its_sublayers_write(make_model):
    """64 elements of heads and 96 of the FFN; a map never joins more than one stage's."""
    source = td.open_source(make_model())
    for stages, needed in ([["F1", "A2"]], 160), ([["F1", "A2", "F2"], ["F3", "A4"]], 256):
        assert tokens_needed(source, td.Plan(6, stages=stages).segments) == needed
    assert tokens_needed(source, MIXED.segments) == 192
    assert tokens_needed(source, []) == 0


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
