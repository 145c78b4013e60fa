"""The default model itself, and the README's words about it. Minutes, and needs hub or PyPI."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from truedepth.sources import wheel

pytestmark = pytest.mark.slow

README = (Path(__file__).parent.parent / "README.md").read_text()
TRUEDEPTH = str(Path(sys.executable).parent / "truedepth")


def readme_commands():
    """The README's truedepth commands, on the default model instead of one behind a login."""
    lines = [line.strip() for line in README.splitlines()]
    for line in lines:
        if line.startswith("truedepth "):
            command = line.partition("#")[0].replace("meta-llama/Llama-3.2-3B", "default")
            yield shlex.split(command.replace("16-25", "14-27"))


def test_the_readmes_commands(tmp_path):
    commands = list(readme_commands())
    assert [command[1] for command in commands] == ["info", "convert", "eval", "generate", "study"]
    for command in commands:
        if command[1] == "eval":
            command += ["--windows", "4"]
        if command[1] == "study":
            command += ["--stride", "15", "--windows", "1", "--permutations", "1"]
        subprocess.run([TRUEDEPTH, *command[1:]], cwd=tmp_path, check=True)


def test_the_readmes_python(tmp_path):
    td.convert("default", tmp_path / "out", td.Plan.span(30, 14, 27))
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    for code in snippets:
        code = code.replace('td.convert("default", "out", plan)', "")
        code = code.replace('against="default"', 'against="default", windows=2')
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_gguf_reader_agrees_with_transformers_own():
    path = wheel.cached() or wheel.download()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ours = td.load(path).model.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_demo_prints_one_page(tmp_path):
    command = [TRUEDEPTH, "demo", "--json", str(tmp_path / "demo.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 80
    assert "30 -> 23" in done.stdout
    data = json.loads((tmp_path / "demo.json").read_text())
    assert 0.5 < data["perplexity"]["excess"] < 1.1
    assert data["answer_before"] != data["answer_after"]
