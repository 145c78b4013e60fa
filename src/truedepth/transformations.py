"""The paper's transformations of a span of layers, as schedules (arXiv 2502.02790)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from truedepth.schedule import Form, Schedule, Step, in_order

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
"""A span that pairs or triples do not divide ends in a smaller group."""

PAIRS = "2-parallel"
"""The transformation that the paper settles on, in the form that becomes a wide layer."""


@dataclass(frozen=True)
class Cell:
    """One transformation of the span of layers `start` to `end - 1`."""

    transformation: str
    start: int
    end: int
    permutation: int = 0
    """Which of the random orders; of a shuffle only."""

    def schedule(self, num_layers: int, seed: int = 0) -> Schedule:
        """The whole model with the span transformed."""
        before, after = in_order(range(self.start)), in_order(range(self.end, num_layers))
        return before + self._span(seed) + after

    def _span(self, seed: int) -> Schedule:
        layers = range(self.start, self.end)
        kind, _, rest = self.transformation.partition(" ")
        form: Form = "par" if rest == "(PAR)" else "lp"
        if kind == "shuffle":
            return in_order(_random_order(layers, f"{seed} {self.permutation}"))
        if kind == "prune":
            return ()
        if kind == "merge":
            return (Step(tuple(layers), "merge"),)
        size = len(layers) if kind == "parallel" else int(kind[0])
        return tuple(
            Step(tuple(layers[first : first + size]), form) for first in range(0, len(layers), size)
        )


def _random_order(layers: range, seed: str) -> list[int]:
    """Every order is equally likely, and spans that begin at the same layer share much of theirs.

    The order of a span is that of the span without its last layer, and that layer somewhere in it.
    What comes before it has been computed already.
    """
    generator = random.Random(f"{seed} {layers.start}")
    order: list[int] = []
    for layer in layers:
        order.insert(generator.randint(0, len(order)), layer)
    return order


def all_cells(
    num_layers: int,
    *,
    permutations: int = 2,
    stride: int = 1,
    transformations: Sequence[str] = tuple(TRANSFORMATIONS),
) -> Iterator[Cell]:
    """Every transformation of every span that begins and ends at a multiple of `stride`."""
    ends = sorted({*range(0, num_layers, stride), num_layers})
    for transformation in transformations:
        for start in ends:
            for end in ends:
                if start < end:
                    orders = permutations if transformation == "shuffle" else 1
                    for permutation in range(orders):
                        yield Cell(transformation, start, end, permutation)


def naive_layers(schedule: Schedule) -> int:
    """Layer evaluations of a schedule that is run by itself, from the first layer."""
    return sum(1 if step.form == "merge" else len(step.layers) for step in schedule)
