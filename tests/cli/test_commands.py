"""Commands made of dataclasses and functions: texts, defaults, bounds, and nothing imported."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from typing import Annotated

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.main import get_command

import truedepth as td
from truedepth.cli import app as cli
from truedepth.cli.app import _without_place
from truedepth.cli.commands import Fields, Given, command
from truedepth.evaluation.accuracy import FEWSHOT_SEED
from truedepth.evaluation.perplexity import perplexity
from truedepth.healing.options import Healing, Objective, Recipe

COMMANDS = get_command(cli.app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_does(name):
    for parameter in COMMANDS[name].params:
        text = parameter.help
        assert text, parameter.name
        assert re.match(r"[A-Z0-9'.]|auto|paper|prefill|k-", text) and text.endswith((".", "…"))
        assert not re.search(r"`|\b[Dd]efault:", text) or parameter.name == "eager", text


def test_defaults_are_the_librarys():
    given = {name: {each.name: each.default for each in COMMANDS[name].params} for name in COMMANDS}
    assert given["eval"]["windows"] == inspect.signature(perplexity).parameters["windows"].default
    assert given["eval"]["seed"] == FEWSHOT_SEED
    for name in ("window", "windows", "stride", "permutations"):
        assert given["study"][name] == inspect.signature(td.study).parameters[name].default
    assert (given["plan"]["tokens"], given["convert"]["tokens"]) == (16384, 65536)
    assert given["heal"]["learning_rate"] == Healing.learning_rate


@pytest.mark.parametrize("name", ["plan", "convert"])
def test_help_shows_the_words_of_a_choice(name, run):
    assert re.search(r"--form +<auto\|pairs>", run(name, "--help")[1])


HEAL = ["heal", "a", "b", "--teacher", "c"]
PLAN = ["plan", "a", "-o", "p.yaml", "--pairs", "1"]
CONVERT = ["convert", "a", "b", "--pairs", "1"]

OUT_OF_BOUNDS = [
    ([*PLAN, "--tokens", "0"], "--tokens must be at least 1, not 0."),
    ([*PLAN, "--own-text", "-0.5"], "--own-text must be from 0 to 1, not -0.5."),
    ([*PLAN, "--max-group", "1"], "--max-group must be at least 2, not 1."),
    ([*PLAN, "--max-run", "1"], "--max-run must be at least 2, not 1."),
    ([*PLAN, "--budget", "-1"], "--budget must be at least 0, not -1."),
    (["plan", "a", "-o", "p.yaml", "--pairs", "0"], "--pairs must be at least 1, not 0."),
    (["plan", "a", "-o", "p.yaml", "--depth", "0"], "--depth must be at least 1, not 0."),
    (["plan", "a", "-o", "p.yaml", "--all-reduces", "0"], "--all-reduces must be at least 1, not"),
    (["convert", "a", "b", "--all-reduces", "0"], "--all-reduces must be at least 1, not 0."),
    ([*CONVERT, "--tokens", "0"], "--tokens must be at least 1, not 0."),
    ([*CONVERT, "--tokens", "1"], "1 calibration tokens are too few"),
    ([*CONVERT, "--pad-heads", "0"], "--pad-heads must be at least 1, not 0."),
    (["convert", "a", "b", "--pairs", "-1"], "--pairs must be at least 0, not -1."),
    (["convert", "a", "b", "--layers", "0-1", "--group", "0"], "--group must be at least 1"),
    ([*HEAL, "--tokens", "0"], "--tokens must be at least 1, not 0."),
    ([*HEAL, "--tokens", "1"], "1 tokens are less than one step of 8 windows of 2."),
    ([*HEAL, "--train", "lora", "--rank", "0"], "--rank must be at least 1, not 0."),
    ([*HEAL, "--next-token", "1.5"], "--next-token must be from 0 to 1, not 1.5."),
    ([*HEAL, "--temperature", "0"], "--temperature must be above 0, not 0."),
    ([*HEAL, "--hidden", "-1"], "--hidden must be at least 0, not -1."),
    ([*HEAL, "--keep-predictions", "-1"], "--keep-predictions must be at least 0, not -1."),
    ([*HEAL, "--sequence-length", "1"], "--sequence-length must be at least 2, not 1."),
    ([*HEAL, "--validation", "0"], "--validation must be at least 1, not 0."),
    ([*HEAL, "--learning-rate", "2"], "--learning-rate must be from 0 to 1, not 2."),
    ([*HEAL, "--warmup", "2"], "--warmup must be from 0 to 1, not 2."),
    ([*HEAL, "--batch-size", "0"], "--batch-size must be at least 1, not 0."),
    ([*HEAL, "--micro-batch-size", "0"], "--micro-batch-size must be at least 1, not 0."),
    ([*HEAL, "--weight-decay", "-1"], "--weight-decay must be at least 0, not -1."),
    ([*HEAL, "--max-grad-norm", "-1"], "--max-grad-norm must be at least 0, not -1."),
    ([*HEAL, "--eval-every", "0"], "--eval-every must be at least 1, not 0."),
    ([*HEAL, "--text", "a.txt=0"], "the weight '0' is not a number above 0."),
    (["study", "a", "-o", "b", "--window", "1"], "--window must be at least 2, not 1."),
    (["study", "a", "-o", "b", "--windows", "0"], "--windows must be at least 1, not 0."),
    (["study", "a", "-o", "b", "--stride", "0"], "--stride must be at least 1, not 0."),
    (["study", "a", "-o", "b", "--permutations", "0"], "--permutations must be at least 1"),
    (["eval", "a", "--window", "1"], "--window must be at least 2, not 1."),
    (["eval", "a", "--windows", "-1"], "--windows must be at least 0, not -1."),
    (["eval", "a", "--batch-size", "0"], "--batch-size must be a number or auto, not '0'."),
    (["eval", "a", "--limit", "0"], "--limit must be at least 1, not 0."),
    (["eval", "a", "--num-fewshot", "0"], "--run-code go with --tasks."),
    (["eval", "a", "--tasks", "b", "--num-fewshot", "-1"], "--num-fewshot must be at least 0"),
    (["bench", "a", "--lengths", "0"], "lengths must be at least 1, not 0."),
    (["bench", "a", "--batch", "1,0"], "batches must be at least 1, not 0."),
    (["bench", "a", "--tp", "0"], "--tp must be at least 1, not 0."),
    (["bench", "a", "--repetitions", "0"], "--repetitions must be at least 1, not 0."),
    (["predict", "a", "--depth", "0"], "--depth must be at least 1, not 0."),
    (["predict", "a", "--tp", "0"], "--tp must be at least 1, not 0."),
    (["predict", "a", "--batch", "0"], "--batch must be at least 1, not 0."),
    (["predict", "a", "--length", "0"], "--length must be at least 1, not 0."),
    (["generate", "a", "b", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    (["generate", "a", "b", "--temperature", "-1"], "--temperature must be at least 0, not -1."),
    (
        ["generate", "a", "b", "--verify", "c", "--draft-tokens", "0"],
        "--draft-tokens must be at least 1, not 0.",
    ),
]


@pytest.mark.parametrize(("words", "sentence"), OUT_OF_BOUNDS, ids=lambda each: str(each)[:60])
def test_what_is_out_of_bounds_is_refused_in_a_sentence(run, words, sentence):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("truedepth: ") and err.endswith(".\n") and err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [[*PLAN, "--tokens", "0"], [*HEAL, "--rank", "0"], ["eval", "a", "--window", "1"]]
)
def test_bad_values_are_refused_before_torch_is_imported(words):
    code = (
        "import sys, atexit; sys.argv = ['truedepth', *sys.argv[1:]]\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "from truedepth.cli.app import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "False\n")


def made(*words):
    """What a command with the options of a healing gets."""
    got = []
    app = typer.Typer()

    @app.command()
    @command()
    def heal(*, healing: Annotated[Given[Healing], Fields(Recipe.paper.healing)]) -> None:
        got.append(healing)

    app(list(words), standalone_mode=False)
    return got[0]


def test_what_the_user_did_not_say_is_as_in_the_base():
    nothing = made()
    assert nothing.said == {}
    assert nothing.over() == Recipe.paper.healing
    assert nothing.over(Healing()) == Healing()
    words = ["--text", "a=2", "--text", "b", "--hidden", "0", "--seed", "0", "--dtype", "float32"]
    some = made(*words, "--device", "cpu")
    healing = some.over()
    assert [(part.name, part.weight) for part in healing.text] == [("a", 2.0), ("b", 1.0)]
    assert healing.objective == Objective(next_token=1.0)
    assert (healing.device, type(healing.device), healing.dtype) == ("cpu", str, torch.float32)
    assert some.over(Healing()).objective == Objective()
    assert set(some.said) == {"text", "hidden", "seed", "dtype", "device"}


def overflowing(make_model, tmp_path):
    """A model whose hidden states are too large for float16 and not for float32."""
    path = make_model(num_hidden_layers=6)
    copied = tmp_path / "large"
    copied.mkdir()
    for file in path.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    weights = load_file(copied / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 1e5
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    return copied


def test_the_advice_about_activations_that_are_not_finite_works(run, make_model, tmp_path):
    model = overflowing(make_model, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and then the hat " * 500)
    calibration = ["--text", text, "--tokens", "2048", "--device", "cpu"]
    convert = ["convert", model, tmp_path / "out", "--layers", "2-5", "--calibrate", *calibration]
    code, _, err = run(*convert, "--compute-dtype", "float16")
    assert code == 1
    advice = re.search(r"truedepth convert (--\S+ float32), truedepth plan (--\S+ float32)", err)
    assert advice is not None, err
    assert run(*convert, "--dtype", "float16", *advice[1].split())[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["truedepth"]["calibration"]["dtype"] == "float32"
    assert config["dtype"] == "float16"

    plan = ["plan", model, "-o", tmp_path / "plan.yaml", *calibration, "--pairs", "1"]
    code, _, err = run(*plan, "--dtype", "float16")
    assert code == 1
    assert advice[0] in err
    words = ["--no-calibrate", "--max-loss", "9"]
    code, _, err = run(*plan[:-2], *words, "--dtype", "float16")
    assert (code, advice[0] in err) == (1, True), err
    assert run(*plan, *advice[2].split())[0] == 0


def test_the_dtype_to_compute_in_goes_with_a_calibration(run, make_model, tmp_path):
    words = ["convert", make_model(), tmp_path / "out", "--layers", "2-3"]
    code, _, err = run(*words, "--compute-dtype", "float32")
    assert code == 2
    assert "--compute-dtype goes with --calibrate" in err


def test_a_command_that_is_shown_names_no_place_of_a_machine():
    words = ["study", "/models/tiny", "--text=/texts/a.txt", "-o", "out/study", "--seed", "1"]
    shown = ["study", "tiny", "--text=a.txt", "-o", "out/study", "--seed", "1"]
    assert list(map(_without_place, words)) == shown
