"""Commands as a user types them: output, JSON, exit codes, one sentence on standard error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

import truedepth as td
from truedepth import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("info", model)` gives (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["truedepth", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "80")
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat and then the hat " * 200)
    return path


def test_info(run, make_model, tmp_path):
    code, out, _ = run("info", make_model(), "--json", tmp_path / "info.json", "--seed", "1")
    assert code == 0
    assert "can be paired  all layers, 0 to 5" in out
    data = json.loads((tmp_path / "info.json").read_text())
    assert data["plan"]["num_layers"] == 6
    assert data["kv_elements_per_token"] == 2 * 6 * 2 * 16
    source = td.open_source(make_model())
    assert data["parameters"] == sum(t.read().numel() for t in source.tensors.values())
    assert [saving["effective_depth"] for saving in data["savings"]] == [6, 5, 4, 3]


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
        (["--pairs", "1"], [[2, 3]]),
        (["--depth", "4"], [[2, 3], [4, 5]]),
        (["--layers", "0-5", "--group", "3"], [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_ways_to_say_what_is_paired(run, make_model, tmp_path, choice, groups):
    assert run("convert", make_model(), tmp_path / "out", *choice)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if choice[0] == "--depth":
        assert config["num_hidden_layers"] == 4
    else:
        assert config["truedepth"]["plan"]["groups"] == groups


def test_a_plan_file(run, make_model, tmp_path):
    td.Plan(6, [[0, 1, 2]]).to_yaml(tmp_path / "plan.yaml")
    assert run("convert", make_model(), tmp_path / "out", "--plan", tmp_path / "plan.yaml")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_widths"] == [3, 1, 1, 1]


@pytest.fixture
def bad(make_model, tmp_path, text):
    """Every kind of bad input by name, as the arguments of a command."""
    model, out = make_model(), tmp_path / "out"
    files = {name: tmp_path / f"{name}.yaml" for name in ("overlap", "gap", "deep", "broken")}
    files["overlap"].write_text("num_layers: 6\ngroups: [[1, 2], [2, 3]]")
    files["gap"].write_text("num_layers: 6\ngroups: [[1, 3]]")
    files["deep"].write_text("num_layers: 8\ngroups: [[6, 7]]")
    files["broken"].write_text("num_layers: [")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("bert", "truncated", "existing"):
        shutil.copytree(model, tmp_path / name)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    pair = ["--pairs", "1"]
    return {
        "missing path": ["info", tmp_path / "nothing"],
        "not a model": ["info", tmp_path / "empty"],
        "not a model file": ["eval", text],
        "unknown family": ["info", tmp_path / "bert"],
        "unknown family to convert": ["convert", tmp_path / "bert", out, *pair],
        "layer out of range": ["convert", model, out, "--layers", "4-7"],
        "span that is none": ["convert", model, out, "--layers", "all"],
        "overlap": ["convert", model, out, "--plan", files["overlap"]],
        "not consecutive": ["convert", model, out, "--plan", files["gap"]],
        "another depth": ["convert", model, out, "--plan", files["deep"]],
        "broken plan": ["convert", model, out, "--plan", files["broken"]],
        "missing plan": ["convert", model, out, "--plan", tmp_path / "none.yaml"],
        "truncated weights": ["convert", tmp_path / "truncated", out, *pair],
        "truncated weights to load": ["eval", tmp_path / "truncated"],
        "nothing to pair": ["convert", model, out],
        "two plans": ["convert", model, out, *pair, "--depth", "5"],
        "too many pairs": ["convert", model, out, "--pairs", "4"],
        "depth too large": ["convert", model, out, "--depth", "7"],
        "depth too small": ["convert", model, out, "--depth", "2"],
        "bad shard size": ["convert", model, out, *pair, "--shard-size", "huge"],
        "existing output": ["convert", model, tmp_path / "existing", *pair],
        "output inside the source": ["convert", model, model / "out", *pair],
        "read-only output": ["convert", model, "/proc/out", *pair],
        "empty text": ["eval", model, "--text", tmp_path / "empty.txt"],
        "missing text": ["eval", model, "--text", tmp_path / "none.txt"],
        "short text": ["eval", model, "--text", text, "--window", "100000"],
        "unknown device": ["eval", model, "--text", text, "--device", "abacus"],
        "unwritable JSON": ["info", model, "--json", tmp_path / "none" / "x.json"],
    }


CASES = [
    ("missing path", "no model at"),
    ("not a model", "config.json"),
    ("not a model file", "not a model"),
    ("unknown family", "'bert', which is not supported; supported: llama"),
    ("unknown family to convert", "'bert'"),
    ("layer out of range", "Layer 7 is out of range: the model has layers 0 to 5"),
    ("span that is none", "'all'"),
    ("overlap", "Layer 2 is in two groups"),
    ("not consecutive", "Group [1, 3] is not consecutive"),
    ("another depth", "for 8 layers"),
    ("broken plan", "not valid YAML"),
    ("missing plan", "Cannot read the plan"),
    ("truncated weights", "model.safetensors is corrupt or truncated"),
    ("truncated weights to load", "model.safetensors"),
    ("nothing to pair", "--layers, --plan, --pairs, --depth"),
    ("two plans", "--layers, --plan, --pairs, --depth"),
    ("too many pairs", "allow 0 to 3"),
    ("depth too large", "has 6 layers"),
    ("depth too small", "allow 0 to 3"),
    ("bad shard size", "'huge'"),
    ("existing output", "--force"),
    ("output inside the source", "inside the source"),
    ("read-only output", "Cannot write to"),
    ("empty text", "is empty"),
    ("missing text", "Cannot read the text"),
    ("short text", "fewer than one window"),
    ("unknown device", "abacus"),
    ("unwritable JSON", "Cannot write"),
]


@pytest.mark.parametrize(("case", "words"), CASES, ids=[case for case, _ in CASES])
def test_bad_input_gives_one_sentence_and_exit_code_2(run, bad, case, words, tmp_path):
    code, out, err = run(*bad[case])
    assert code == 2
    assert words in err
    assert err.startswith("truedepth: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_every_bad_input_is_tried(bad):
    assert set(bad) == {case for case, _ in CASES}


@pytest.mark.parametrize("arguments", [["nonsense"], ["info"], ["eval", "x", "--window", "1"]])
def test_wrong_usage_exits_with_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["", "info", "convert", "eval", "generate", "demo"])
def test_help_fits_80_columns_and_needs_no_torch(command):
    code = (
        "import sys; sys.argv = ['truedepth', *sys.argv[1:]]\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "from truedepth.cli import main; main()"
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


def test_version(run):
    assert run("--version")[1] == f"truedepth {td.__version__}\n"
