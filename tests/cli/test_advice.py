"""Sentences that name options: the options exist, in every command that may say the sentence."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer.main

import truedepth
from truedepth.cli.app import app
from truedepth.cli.errors import DEBUG

ROOT = Path(truedepth.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
NAMED = re.compile(r"truedepth ((?:\w+(?:, | and )?)+)")  # "truedepth convert, eval and plan take"

COMMANDS = {
    name: {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    for name, command in typer.main.get_command(app).commands.items()
}

BESIDE_COMMANDS = {  # options of other programs, and those that stand before a command
    "sources/wheel.py": {"--no-deps", "--quiet", "--disable-pip-version-check", "--dest"},
    "sources/gguf/source.py": {"--merge"},
    "checkpoint/card.py": {"--tensor-parallel-size"},
    "engines/vllm/stages.py": {"--tensor-parallel-size"},
    "cli/errors.py": {DEBUG},
    "cli/app.py": {"--version"},
}

SAID_BY = {
    "calibration/run.py": "convert",
    "calibration/windows.py": "plan convert",
    "checkpoint": "convert heal demo",
    "conversion.py": "convert demo",
    "depth_study": "study",
    "engines/gguf/export.py": "export",
    "evaluation": "eval",
    "evaluation/perplexity.py": "eval demo",
    "files/atomic.py": "convert heal export demo",
    "files/resumable.py": "heal",  # a calibration begins again instead of refusing
    "healing": "heal",
    "planning": "plan convert",
    "report/healing.py": "heal",
    "report/plots.py": "bench heal plan",
    "runtime/generation.py": "generate demo",
    "runtime/prompt.py": "generate eval",  # demo's model is known, and so is its chat template
    "speed": "bench",
    "speed/prediction.py": "predict",
    "speed/ranks.py": "bench predict",
}
"""The commands that come to a file's or a room's sentences; any command comes to the others."""


def literals(tree):
    """The strings of a module that are not docstrings; the parts of an f-string are one."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr) and node not in skipped:
            parts = [part for part in node.values if isinstance(part, ast.Constant)]
            skipped.update(parts)
            yield "…".join(part.value for part in parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped:
            yield node.value


def sentences():
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for text in literals(ast.parse(path.read_text(encoding="utf-8"))):
            found = set(OPTION.findall(text)) - BESIDE_COMMANDS.get(name, set())
            if found:
                yield pytest.param(name, text, found, id=f"{name}: {' '.join(sorted(found))}")


@pytest.mark.parametrize(("name", "text", "options"), sentences())
def test_advice_names_options_that_exist(name, text, options):
    named = [word for match in NAMED.findall(text) for word in re.split(", | and ", match)]
    named = [word for word in named if word in COMMANDS]
    if named:  # then every option belongs to one of them
        assert all(any(option in COMMANDS[each] for each in named) for option in options)
        return
    if name.startswith("cli/"):  # each stands in its command's own function
        assert all(any(option in flags for flags in COMMANDS.values()) for option in options)
        return
    room = name.split("/")[0]
    for command in SAID_BY.get(name, SAID_BY.get(room, " ".join(COMMANDS))).split():
        assert options <= COMMANDS[command], f"{command} has no {options - COMMANDS[command]}"


def test_the_sentences_are_found():
    found = {param.values[0] for param in sentences()}
    assert {"sources/tokenizer.py", "sources/weights.py", "widening/padding.py"} <= found
    assert {each for each in BESIDE_COMMANDS if not (ROOT / each).exists()} == set()
    assert set(SAID_BY) <= found | {name.split("/")[0] for name in found}  # none is left over
