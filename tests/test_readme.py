"""What the README tells a newcomer to type, on a small random model instead of the one it names."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import forks

README = (Path(__file__).parent.parent / "README.md").read_text()
TRUEDEPTH = str(Path(sys.executable).parent / "truedepth")


RAW = {"--layers", "--staggered"}
"""Options of conversions that need no text."""


@pytest.fixture(scope="module")
def model(make_model):
    """As deep as the model that the README names, and with room for the default windows."""
    return str(make_model(num_hidden_layers=28, max_position_embeddings=1024))


def commands(model, prose):
    """The README's truedepth commands; a random model's losses are larger."""
    for line in map(str.strip, README.splitlines()):
        if line.startswith("truedepth "):
            words = shlex.split(line.partition("#")[0])
            stand_ins = {"meta-llama/Llama-3.2-3B": model, "FILE": str(prose), "0.05": "5"}
            yield [stand_ins.get(word, word) for word in words]


def test_the_commands(model, prose, tmp_path):
    names = []
    for command in commands(model, prose):
        names.append(command[1])
        if command[1] in ("eval", "study"):
            command += ["--text", str(prose), "--window", "64", "--windows", "2"]
        if command[1] == "study":
            command += ["--stride", "14", "--permutations", "1"]
        if command[1] == "convert":
            command.append("--force")
        if command[1] in ("convert", "plan") and not RAW & {*command}:
            command += ["--tokens", "512", "--window", "64"]
        searches = command[1] != "predict" and {"--max-loss", "--all-reduces"} & {*command}
        if searches:  # runs of three take as long again
            command += ["--max-run", "2"]
        if command[1] == "heal":
            command += ["--tokens", "1024", "--sequence-length", "64", "--batch-size", "4"]
        if command[1] == "bench":
            command[command.index("vllm")] = "transformers"  # vLLM has tests of its own
            command += ["--lengths", "8", "--repetitions", "1"]
        if command[1] == "info":  # as it is typed; the others without importing once more
            subprocess.run([TRUEDEPTH, *command[1:]], cwd=tmp_path, check=True)
        else:
            done = forks.truedepth(*command[1:], cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    assert set(names) == {
        *("bench", "convert", "eval", "export", "generate", "heal", "info", "plan", "predict"),
        "study",
    }


def test_the_python(model, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    for code in reversed(snippets):  # the second makes what the first loads
        few = "td.Calibration(tokens=512, window=64)"
        code = code.replace('"default"', repr(model)).replace('"out", plan', f'"out", plan, {few}')
        code = code.replace(
            "max_loss=0.05", f"max_loss=5, merges=td.Merges(max_run=2), calibration={few}"
        )
        code = code.replace("against=", "windows=2, against=")
        done = forks.python(code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
