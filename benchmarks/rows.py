"""What the scripts of this directory share: their options, and results kept as JSON.

A long script measures row after row and keeps them in one file, so that the same command resumes
where it stopped: rows that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import truedepth as td
from truedepth.runtime.loading import Loaded

WINDOWS = 64
"""Windows of 512 tokens that a text is measured on: 32,704 predicted tokens."""

LOSS = ("excess", "excess_stderr", "kl", "tokens")
"""What is kept of a measurement."""


def parser_of(doc: str | None, *, json_required: bool = True) -> argparse.ArgumentParser:
    """A parser with `--json`, described by the first line of a script's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=json_required, help="results, as JSON")
    return parser


class Rows(dict[str, Any]):
    """Rows by name, in a JSON file that is written anew with every row."""

    def __init__(self, path: Path) -> None:
        """Begin with the rows that the file has, if it is there."""
        super().__init__(json.loads(path.read_text()) if path.exists() else {})
        self._path = path

    def __setitem__(self, name: str, row: Any) -> None:
        """Keep a row."""
        super().__setitem__(name, row)
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text(json.dumps(self, indent=1) + "\n")
        partial.replace(self._path)

    def show(self, name: str, part: str | None = None) -> None:
        """Print a row, or one part of it."""
        row = self[name] if part is None else self[name][part]
        print(name, json.dumps(row), flush=True)


def losses(
    model: Loaded,
    original: Loaded,
    texts: Iterable[Path],
    windows: int = WINDOWS,
    parts: Iterable[str] = LOSS,
) -> dict[str, dict[str, Any]]:
    """What a model loses against its original, by the name of each text."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        loss = td.perplexity(model, against=original, text=text, windows=windows)
        found[text.name] = {part: getattr(loss, part) for part in parts}
    return found


def report(result: dict[str, Any], path: Path | None) -> None:
    """Print a result, and write it where `--json` says."""
    text = json.dumps(result, indent=2)
    print(text)
    if path:
        path.write_text(text + "\n")


def machine() -> str:
    """The processor, and the threads that torch uses."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
