"""How deep is a model really: the paper's transformations of every span of its layers.

A cell is one transformation of the layers s to e - 1. Cells become schedules; schedules are run as
one tree (schedule.py) and what each gave is kept in the study's directory as it comes, so that the
same command goes on where an earlier run stopped.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.schedule import Form, Runner, Schedule, Step, in_order
from truedepth.sources import Source

TRANSFORMATIONS = {
    "shuffle": "the layers of the span in random order",
    "prune": "the span left out",
    "merge": "one layer with the mean of the span's weights",
    "parallel": "all layers of the span side by side",
    "parallel (PAR)": "the same, every layer whole",
    "2-parallel": "consecutive pairs of the span side by side",
    "2-parallel (PAR)": "the same, every layer whole",
    "3-parallel": "consecutive triples of the span side by side",
    "3-parallel (PAR)": "the same, every layer whole",
}

BEST = "2-parallel"
"""The transformation that the paper settles on, in the form that becomes a wide layer."""


@dataclass(frozen=True)
class Cell:
    """One transformation of the span of layers `start` to `end - 1`."""

    transformation: str
    start: int
    end: int
    permutation: int = 0
    """Which of the random orders; of a shuffle only."""

    def schedule(self, num_layers: int, seed: int) -> Schedule:
        """The whole model's schedule with the span transformed."""
        span = range(self.start, self.end)
        before, after = in_order(range(self.start)), in_order(range(self.end, num_layers))
        return before + _transformed(self, span, seed) + after


def _transformed(cell: Cell, span: range, seed: int) -> Schedule:
    kind, _, form_name = cell.transformation.partition(" ")
    form: Form = "par" if form_name == "(PAR)" else "lp"
    if kind == "shuffle":
        order = list(span)
        random.Random(f"{seed} {cell.permutation} {cell.start} {cell.end}").shuffle(order)
        return in_order(order)
    if kind == "prune":
        return ()
    if kind == "merge":
        return (Step(tuple(span), "merge"),)
    size = len(span) if kind == "parallel" else int(kind[0])
    groups = (span[first : first + size] for first in range(0, len(span), size))
    return tuple(Step(tuple(group), form) for group in groups)


def all_cells(
    num_layers: int,
    permutations: int = 3,
    stride: int = 1,
    transformations: Sequence[str] = tuple(TRANSFORMATIONS),
) -> Iterator[Cell]:
    """Every transformation of every span that begins and ends at multiples of `stride`."""
    ends = sorted({*range(0, num_layers, stride), num_layers})
    for transformation in transformations:
        for start in ends:
            for end in ends:
                if start < end:
                    orders = permutations if transformation == "shuffle" else 1
                    for permutation in range(orders):
                        yield Cell(transformation, start, end, permutation)


class Cells:
    """What schedules gave, kept in a directory; one model, one text, one way of measuring."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """Open a study's directory, or begin one.

        Raises:
            TruedepthError: The directory holds a study of another model, text or setting.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / "cells.jsonl"
        self.values: dict[str, Tensor] = {}
        head = json.dumps({"identity": identity}, sort_keys=True)
        if not self._path.exists():
            if any(directory.iterdir()):
                raise TruedepthError(f"{directory} is not empty and holds no study; give another.")
            self._path.write_text(head + "\n", encoding="utf-8")
        text = self._path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # a run was killed while it wrote the last line
            text = text[: text.rfind("\n") + 1]
            self._path.write_text(text, encoding="utf-8")
        lines = text.splitlines()
        _check_identity(directory, lines[:1], identity)
        for line in lines[1:]:
            kept = json.loads(line)
            self.values[kept["schedule"]] = torch.tensor(kept["nll"], dtype=torch.float64)

    def add(self, schedule: Schedule, nll: Tensor) -> None:
        """Keep what a schedule gave."""
        self.values[name_of(schedule)] = nll
        line = json.dumps({"schedule": name_of(schedule), "nll": nll.tolist()})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def name_of(schedule: Schedule) -> str:
    """`0 1 2+3 4`."""
    return " ".join(map(str, schedule))


def _check_identity(directory: Path, head: list[str], identity: dict[str, Any]) -> None:
    try:
        kept = json.loads(head[0])["identity"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TruedepthError(f"{directory / 'cells.jsonl'} is not a study's.") from error
    for key, value in identity.items():
        if kept.get(key) != value:
            raise TruedepthError(
                f"{directory} holds a study with another {key}, {kept.get(key)} instead of {value};"
                " give another directory."
            )


def fingerprint(source: Source) -> str:
    """A hash of a model's config and of the first and last row of every tensor."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(source.tensors.items()):
        count = tensor.shape[0] if tensor.shape else 1
        digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
        for row in {0, count - 1}:
            values = tensor.rows(row, row + 1).contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def naive_layers(schedule: Schedule) -> int:
    """Layer evaluations of a schedule that is run by itself, from the first layer."""
    return sum(1 if step.form == "merge" else len(step.layers) for step in schedule)


def run_cells(
    runner: Runner, cells: Sequence[Cell], seed: int, kept: Cells
) -> Iterator[tuple[Schedule, Tensor]]:
    """Run the schedules of `cells` that are not kept yet, keeping each; the original among them."""
    count = len(runner.layers)
    wanted = {cell.schedule(count, seed) for cell in cells} | {in_order(range(count))}
    missing = [schedule for schedule in wanted if name_of(schedule) not in kept.values]
    for schedule, nll in runner.run(missing):
        kept.add(schedule, nll)
        yield schedule, nll
