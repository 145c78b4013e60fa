"""Commands as a user types them: output, JSON, exit codes, one sentence on standard error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import truedepth as td
from family_models import options_of
from truedepth.cli import app as cli


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and then the hat " * 200)
    return path


def test_info(run, make_model, tmp_path):
    code, out, _ = run("info", make_model(), "--json", tmp_path / "info.json", "--seed", "1")
    assert code == 0
    assert "can be paired     layers 0 to 5" in out
    assert "can share stages  any neighbours" in out
    data = json.loads((tmp_path / "info.json").read_text())
    assert data["plan"]["num_layers"] == 6
    assert data["kv_elements_per_token"] == 2 * 6 * 2 * 16
    source = td.open_source(make_model())
    assert data["parameters"] == sum(t.read().numel() for t in source.tensors.values())
    assert [saving["effective_depth"] for saving in data["savings"]] == [6, 5, 4, 3]
    assert [saving["all_reduces_per_token"] for saving in data["savings"]] == [12, 10, 8, 6]
    assert [saving["staggered"] for saving in data["savings"]] == [0, 2, 4, None]  # 5 at most


def test_info_of_stages(run, make_model, tmp_path):
    plan = td.Plan(6, [[0, 1]], stages=[["F2", "A3"], ["F3", "A4"]])
    td.convert(make_model(), tmp_path / "out", plan)
    code, out, _ = run("info", tmp_path / "out", "--json", tmp_path / "info.json")
    assert code == 0
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert rows["plan"].strip() == "[0+1] · A2 [F2 A3] [F3 A4] F4 · 5"
    assert rows["effective depth"].strip() == "6 -> 4"
    assert rows["all-reduces"].strip() == "12 -> 8 per token with tensor parallelism"
    assert "2 hold several sub-layers" in rows["stages"]
    data = json.loads((tmp_path / "info.json").read_text())
    assert data["plan"]["stages"] == data["run"]["stages"] == [["F2", "A3"], ["F3", "A4"]]


def test_info_of_a_family_whose_stages_hold_whole_layers(run, make_model):
    code, out, _ = run("info", make_model(**options_of("cohere")))
    assert code == 0
    assert "can share stages  whole layers: [A0 F0], which loses nothing" in out


def test_info_needs_no_weights(run, make_model, tmp_path):
    shutil.copy(make_model() / "config.json", tmp_path)
    assert run("info", tmp_path)[0] == 0


def test_convert_eval_generate_info(run, make_model, tmp_path, text):
    out = tmp_path / "out"
    code, printed, _ = run(
        "convert", make_model(), out, "--layers", "1-4", "--json", tmp_path / "j"
    )
    assert code == 0
    assert "0 [1+2] [3+4] 5" in printed
    assert "6 -> 4 (Δ = 4)" in printed
    assert json.loads((tmp_path / "j").read_text())["plan"]["groups"] == [[1, 2], [3, 4]]

    arguments = ["--text", text, "--window", 64, "--json", tmp_path / "j", "--dtype", "float32"]
    code, printed, _ = run("eval", out, "--against", make_model(), "--device", "cpu", *arguments)
    assert code == 0
    measured = td.perplexity(out, against=make_model(), text=text, window=64)
    assert json.loads((tmp_path / "j").read_text())["excess"] == pytest.approx(measured.excess)
    assert f"{measured.excess:.4f} ± {measured.excess_stderr:.4f}" in printed

    before = (out / "README.md").read_text()
    assert run("eval", out, "--against", make_model(), *arguments, "--card")[0] == 0
    card = (out / "README.md").read_text()
    assert card.startswith(before)
    assert f"### Loss on {text.name}\n" in card
    assert f"| excess loss | {measured.excess:.4f} ±" in card
    few = ["--max-new-tokens", 4, "--card"]
    assert run("eval", out, "--against", make_model(), "--generation", *few)[0] == 0
    card = (out / "README.md").read_text()
    assert f"### Loss on {text.name}\n" in card
    assert "### Generation\n" in card
    assert "| answers of | tokens | ended by themselves | ending in a loop |\n| - | -: |" in card
    assert "\n| difference | " in card
    few = ["--items", 2, "--lengths", 400, "--batch-size", 2, "--card", "--json", tmp_path / "j"]
    code, printed, said = run("eval", out, "--against", make_model(), "--probes", *few)
    assert code == 0, said
    scores = json.loads((tmp_path / "j").read_text())["scores"]
    assert {score["items"] for score in scores} == {2}
    card = (out / "README.md").read_text()
    assert "### Generation\n" in card
    assert "### Probes\n" in card
    for score in scores:
        assert score["task"] in printed
        assert f"| {score['task']} | 2 | " in card
    code, _, said = run("eval", make_model(), *arguments, "--card")
    assert code == 2
    assert "is not a checkpoint with a model card that truedepth has written" in said

    code, printed, _ = run("generate", out, "the cat", "--max-new-tokens", 8)
    assert code == 0
    code, again, _ = run("generate", out, "the cat", "--max-new-tokens", 8)
    assert printed == again

    code, printed, _ = run("info", out)
    assert code == 0
    assert "0 [1+2] [3+4] 5" in printed
    assert "12 -> 8" in printed


def test_sampling_depends_on_the_seed_alone(run, make_model):
    ask = ["generate", make_model(), "the cat", "--temperature", 1.0, "--max-new-tokens", 16]
    first, second, other = (run(*ask, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize(
    ("choice", "groups"),
    [
        (["--pairs", "0"], []),
        (["--layers", "2-5"], [[2, 3], [4, 5]]),
        (["--layers", "0-5", "--group", "3"], [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_ways_to_say_what_is_paired(run, make_model, tmp_path, choice, groups):
    assert run("convert", make_model(), tmp_path / "out", *choice)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["truedepth"]["plan"]["groups"] == groups


def test_a_plan_file(run, make_model, tmp_path):
    td.Plan(6, [[0, 1, 2]]).to_yaml(tmp_path / "plan.yaml")
    assert run("convert", make_model(), tmp_path / "out", "--plan", tmp_path / "plan.yaml")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_widths"] == [3, 1, 1, 1]


PAIR = ["--layers", "2-3"]

# What is bad -> arguments, in which {names} stand for what `bad_inputs` makes, and words expected.
BAD = {
    "missing path": (["info", "{tmp}/nothing"], "no model at"),
    "not a model": (["info", "{tmp}/empty"], "config.json"),
    "not a model file": (["eval", "{text}"], "not a model"),
    "impossible hub id": (["info", "foo/bar--baz"], "possible hub id"),
    "unknown family": (
        ["info", "{tmp}/bert"],
        "'bert', which is not supported: its decoder layers are not in a list",
    ),
    "unknown family to convert": (["convert", "{tmp}/bert", "{out}", *PAIR], "'bert'"),
    "unknown activation": (["info", "{tmp}/activation"], "cannot build the model"),
    "unknown RoPE to convert": (["convert", "{tmp}/rope", "{out}", *PAIR], "transformers"),
    "no heads": (
        ["convert", "{tmp}/heads", "{out}", *PAIR],
        "num_attention_heads as a whole number of at least 1, not 0",
    ),
    "layer out of range": (
        ["convert", "{model}", "{out}", "--layers", "4-7"],
        "Layer 7 is out of range: the model has layers 0 to 5",
    ),
    "span that is none": (["convert", "{model}", "{out}", "--layers", "all"], "'all'"),
    "empty span": (["convert", "{model}", "{out}", "--layers", ""], "''"),
    "lengths that are none": (["bench", "{model}", "--lengths", "1,a"], "not '1,a'"),
    "no such task": (["bench", "{model}", "--tasks", "write"], "prefill, generate, decode"),
    "a picture of nothing": (["bench", "{model}", "--plot", "x.png"], "needs --against"),
    "an engine that fuses by itself": (
        ["bench", "{model}", "--engine", "vllm", "--fuse"],
        "--fuse goes with --engine transformers; vllm joins maps by itself",
    ),
    "heads over ranks": (["bench", "{model}", "--tp", "3"], "4 heads and 2 KV heads"),
    "nothing to predict": (["predict", "{model}"], "give --all-reduces, --depth or --plan"),
    "depth out of reach": (["predict", "{model}", "--depth", "2"], "of 3 to 6, not 2"),
    "a link for one": (["predict", "{model}", "--depth", "4", "--link", "pcie4"], "--tp of 2"),
    "drafts of nobody": (["generate", "{model}", "hi", "--draft-tokens", "3"], "with --verify"),
    "overlap": (["convert", "{model}", "{out}", "--plan", "{tmp}/overlap.yaml"], "in two groups"),
    "not consecutive": (
        ["convert", "{model}", "{out}", "--plan", "{tmp}/gap.yaml"],
        "Group [1, 3] is not consecutive",
    ),
    "another depth": (["convert", "{model}", "{out}", "--plan", "{tmp}/deep.yaml"], "for 8 layers"),
    "broken plan": (
        ["convert", "{model}", "{out}", "--plan", "{tmp}/broken.yaml"],
        "not valid YAML",
    ),
    "missing plan": (["convert", "{model}", "{out}", "--plan", "{tmp}/no.yaml"], "Cannot read"),
    "truncated weights": (
        ["convert", "{tmp}/truncated", "{out}", *PAIR],
        "model.safetensors is corrupt or truncated",
    ),
    "truncated weights to load": (["eval", "{tmp}/truncated"], "model.safetensors is corrupt"),
    "nothing to pair": (["convert", "{model}", "{out}"], "--max-loss, --all-reduces, --depth"),
    "two plans": (["convert", "{model}", "{out}", *PAIR, "--depth", "5"], "one of --max-loss"),
    "group without span": (
        ["convert", "{model}", "{out}", "--pairs", "1", "--group", "3"],
        "--layers only",
    ),
    "too many pairs": (
        ["convert", "{model}", "{out}", "--pairs", "4"],
        "4 all-reduces are out of reach (an effective depth of 2): these merges leave 6 to 10 of",
    ),
    "depth too large": (["convert", "{model}", "{out}", "--depth", "7"], "leave 4 to 11 of the"),
    "depth too small": (["convert", "{model}", "{out}", "--depth", "1.5"], "3 all-reduces are out"),
    "loss that is none": (
        ["convert", "{model}", "{out}", "--max-loss", "low"],
        "'low' is not a loss",
    ),
    "no loss": (
        ["plan", "{model}", "-o", "{tmp}/p.yaml", "--max-loss", "0%"],
        "'0%' is not a loss",
    ),
    "no goal": (["plan", "{model}", "-o", "{tmp}/p.yaml"], "of --max-loss, --all-reduces, --depth"),
    "no picture": (
        ["plan", "{model}", "-o", "{tmp}/p.yaml", "--pairs", "1", "--plot", "{tmp}/p.doc"],
        "must end in one of .png, .svg, .pdf",
    ),
    "no picture of healing": (
        ["heal", "{model}", "{out}", "--teacher", "{model}", "--plot", "{tmp}/p.doc"],
        "must end in one of .png, .svg, .pdf",
    ),
    "tokens for nothing": (["convert", "{model}", "{out}", *PAIR, "--tokens", "99"], "--calibrate"),
    "budget for nothing": (["convert", "{model}", "{out}", *PAIR, "--budget", "9"], "--max-loss"),
    "search without text": (
        ["plan", "{model}", "-o", "{tmp}/p.yaml", "--pairs", "1", "--text", "{tmp}/empty.txt"],
        "is empty",
    ),
    "too few tokens after a search": (
        ["convert", "{model}", "{out}", "--pairs", "1", "--tokens", "99"],
        "99 calibration tokens are too few",
    ),
    "search with too few tokens": (
        ["plan", "{model}", "-o", "{tmp}/p.yaml", "--pairs", "1", "--tokens", "600"],
        "600 calibration tokens are too few",
    ),
    "shard size": (["convert", "{model}", "{out}", *PAIR, "--shard-size", "huge"], "'huge'"),
    "no shard size": (["convert", "{model}", "{out}", *PAIR, "--shard-size", "0GB"], "'0GB'"),
    "existing output": (["convert", "{model}", "{tmp}/existing", *PAIR], "--force"),
    "output inside the source": (["convert", "{model}", "{model}/out", *PAIR], "inside the source"),
    "read-only output": (["convert", "{model}", "/proc/out", *PAIR], "Cannot write to"),
    "empty text": (["eval", "{model}", "--text", "{tmp}/empty.txt"], "is empty"),
    "missing text": (["eval", "{model}", "--text", "{tmp}/no.txt"], "Cannot read the text"),
    "short text": (
        ["eval", "{model}", "--text", "{tmp}/short.txt"],
        "fewer than one window of 512",
    ),
    "long window": (["eval", "{model}", "--text", "{text}", "--window", "600"], "512 positions"),
    "another vocabulary": (
        ["eval", "{model}", "--text", "{text}", "--window", "64", "--against", "{vocabulary}"],
        "320 and 384 entries",
    ),
    "no tokenizer": (["eval", "{tmp}/dumb"], "no tokenizer"),
    "half a character": (
        ["eval", "{model}", "--text", "{tmp}/half.jsonl"],
        "Line 2 of {tmp}/half.jsonl holds half of a character, \\ud83d",
    ),
    "a prompt of other bytes": (["generate", "{model}", "a \udcff cat"], "the byte 0xff"),
    "a long prompt": (
        ["generate", "{model}", "the cat " * 600],
        "has 512 positions for prompt and answer together",
    ),
    "empty prompt": (["generate", "{model}", ""], "prompt is empty"),
    "unknown device": (["eval", "{model}", "--text", "{text}", "--device", "abacus"], "abacus"),
    "unwritable JSON": (["info", "{model}", "--json", "{tmp}/none/x.json"], "Cannot write"),
}


@pytest.fixture
def bad_inputs(make_model, tmp_path, text):
    """Paths to bad things, by the names in `BAD`."""
    model = make_model()
    (tmp_path / "overlap.yaml").write_text("num_layers: 6\ngroups: [[1, 2], [2, 3]]")
    (tmp_path / "gap.yaml").write_text("num_layers: 6\ngroups: [[1, 3]]")
    (tmp_path / "deep.yaml").write_text("num_layers: 8\ngroups: [[6, 7]]")
    (tmp_path / "broken.yaml").write_text("num_layers: [")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the cat")
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "the \\ud83d cat"}\n')
    (tmp_path / "empty").mkdir()
    config = json.loads((model / "config.json").read_text())
    changes = {
        "bert": {"model_type": "bert"},
        "activation": {"hidden_act": "nope"},
        "rope": {"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}},
        "heads": {"num_attention_heads": 0},
        "existing": {},
    }
    for name, change in changes.items():
        shutil.copytree(model, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    shutil.copytree(model, tmp_path / "truncated")
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(model, tmp_path / "dumb", ignore=shutil.ignore_patterns("tokenizer*"))
    vocabulary = make_model(vocab_size=384)
    out = tmp_path / "out"
    return {"tmp": tmp_path, "model": model, "text": text, "vocabulary": vocabulary, "out": out}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_sentence_and_exit_code_2(run, bad_inputs, arguments, words):
    code, out, err = run(*[argument.format(**bad_inputs) for argument in arguments])
    assert code == 2, err
    assert words.format(**bad_inputs) in err
    assert err.startswith("truedepth: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert out == ""
    assert not bad_inputs["out"].exists()


@pytest.mark.parametrize("arguments", [["nonsense"], ["info"], ["eval", "x", "--window", "1"]])
def test_wrong_usage_exits_with_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


COMMANDS = [
    *("", "info", "study", "plan", "convert", "heal", "eval", "export", "bench", "predict"),
    *("generate", "demo"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_needs_no_torch(command):
    code = (
        "import sys; sys.argv = ['truedepth', *sys.argv[1:]]\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from truedepth.cli.app import main; main()"
    )
    arguments = [*command.split(), "--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={"COLUMNS": "80", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0
    assert done.stderr.strip() == "False"
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert not re.search(r"--[\w-]+…", done.stdout)  # a name cut short


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_every_command_takes_what_all_take(command):
    given = {option for p in get_command(cli.app).commands[command].params for option in p.opts}
    assert given >= {"--json", "--seed", "--device", "--dtype"}


def test_bench_and_predict_fit_80_columns(run, make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", td.Plan(6, [[1, 2]]))
    picture = tmp_path / "speed.svg"
    arguments = ["--against", make_model(), "--lengths", "8,16", "--repetitions", "2"]
    code, out, err = run("bench", tmp_path / "out", *arguments, "--plot", picture)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert [line.split()[:3] for line in out.splitlines() if line.startswith("decode")] == [
        ["decode", "8", "1"],
        ["decode", "16", "1"],
    ]
    assert "speed-up" in picture.read_text()
    code, out, err = run("predict", tmp_path / "out", "--tp", "2", "--link", "30,12.5")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"all-reduces +0\.\d+ +0\.\d+", out)
    assert "Predicted speed-up: " in out


def test_verified_generation(run, make_model, tmp_path):
    td.convert(make_model(), tmp_path / "out", td.Plan(6, [[1, 2]]))
    options = ["the cat", "--max-new-tokens", "12"]
    alone = run("generate", make_model(), *options)[1]
    code, out, err = run("generate", tmp_path / "out", *options, "--verify", make_model())
    assert code == 0
    assert out == alone
    assert re.search(
        r"12 tokens in \d+ passes of .*; \d+% of \d+ drafted tokens were accepted\.", err
    )


def test_version(run):
    assert run("--version")[1] == f"truedepth {td.__version__}\n"


def test_brackets_in_names_are_printed_as_they_are(run, make_model, tmp_path, monkeypatch):
    """rich would take them for markup."""
    monkeypatch.chdir(tmp_path)
    Path("a[v2][_x].txt").write_text("the cat sat on the mat " * 99)
    code, out, _ = run("eval", make_model(), "--text", "a[v2][_x].txt", "--window", 64)
    assert code == 0
    assert "a[v2][_x].txt" in out


def test_a_note_where_the_plan_was_made_for_another_model(run, make_model, tmp_path):
    td.Plan(6, [[0, 1]], model="someone/other").to_yaml(tmp_path / "plan.yaml")
    arguments = ["convert", make_model(), tmp_path / "out", "--plan", tmp_path / "plan.yaml"]
    code, _, err = run(*arguments)
    assert code == 0
    assert "note: the plan was made for someone/other" in err


def test_a_converted_model_needs_no_import_of_ours_first(make_model, tmp_path):
    """The command itself makes transformers know the checkpoint's classes."""
    td.convert(make_model(), tmp_path / "out", td.Plan(6, stages=[["F2", "A3"]]))
    done = subprocess.run(
        [sys.executable, "-m", "truedepth", "info", "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "12 -> 11" in done.stdout


def test_terminals_without_unicode(make_model):
    done = subprocess.run(
        [sys.executable, "-m", "truedepth", "info", str(make_model())],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0
    assert b"effective depth" in done.stdout


def test_the_demos_page(run, make_model, monkeypatch, tmp_path):
    from truedepth import demo

    source = td.open_source(make_model(num_hidden_layers=30, max_position_embeddings=256))
    monkeypatch.setattr(demo, "open_source", lambda name: source)
    monkeypatch.setattr(demo, "TOKENS", 2048)
    monkeypatch.setattr(demo, "WINDOWS", 2)
    monkeypatch.setattr(demo, "REPETITIONS", 1)
    monkeypatch.setattr(demo, "ANSWER", 16)
    code, out, _ = run("demo", "--out", tmp_path / "kept", "--json", tmp_path / "demo.json")
    assert code == 0
    data = json.loads((tmp_path / "demo.json").read_text())
    assert data["conversion"]["all_reduces_per_token"] == {"original": 60, "converted": 46}
    for name in ("model", "base"):
        assert min(data["speed"][name]["seconds"]) > 0
    assert 0 < data["generation"]["agreement"] < data["generation"]["itself"] == 1
    said = ("30 -> 23", f"{data['perplexity']['perplexity']:.2f}", "tokens/s", "end in a loop")
    for words in (*said, f"{data['generation']['agreement']:.1%}"):
        assert words in out
    page = out.partition(demo.PROMPT)[0]  # answers of a random model hold characters of any width
    assert max(map(len, page.splitlines())) <= 80
    assert (tmp_path / "kept" / "config.json").exists()
    assert run("demo", "--out", tmp_path / "kept")[0] == 2
