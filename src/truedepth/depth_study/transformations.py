"""Transformations of a span of layers, as schedules: the paper's (arXiv 2502.02790), and stages of
sub-layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from truedepth.depth_study.schedule import Form, Schedule, Step, in_order
from truedepth.plan.stages import ATTENTION, FFN, KINDS, Stage, Sublayer, staggered_stages


@dataclass(frozen=True)
class Transformation:
    """A way to change a span of layers."""

    description: str
    schedule: Callable[[range, str], Schedule]
    """Makes the steps of a span, from its layers and the seed of its random choices."""

    random: bool = False
    """Whether the steps depend on the seed."""


def _side_by_side(size: int | None, form: Form) -> Callable[[range, str], Schedule]:
    """Groups of `size` consecutive layers, or one group of all of them."""

    def schedule(span: range, _: str) -> Schedule:
        step = size or len(span)
        return tuple(
            Step(tuple(span[first : first + step]), form) for first in range(0, len(span), step)
        )

    return schedule


def _random_order(span: range, seed: str) -> Schedule:
    """A random order; all orders are equally likely.

    The order of a span is that of the span without its last layer, with that layer inserted at a
    random place. The steps before that place have been computed already for the shorter span.
    """
    generator = random.Random(f"{seed} {span.start}")
    order: list[int] = []
    for layer in span:
        order.insert(generator.randint(0, len(order)), layer)
    return in_order(order)


def _in_stages(*stages: Stage) -> Schedule:
    return tuple(Step(stage=stage) for stage in stages)


def _staggered(span: range, _: str) -> Schedule:
    """`[A14] [F14 A15] … [F26 A27] [F27]`."""
    if len(span) == 1:
        return in_order(span)
    first, last = span[0], span[-1]
    ends = (Sublayer(first, ATTENTION),), (Sublayer(last, FFN),)
    return _in_stages(ends[0], *staggered_stages(first, last), ends[1])


def _blocks(span: range, _: str) -> Schedule:
    """`[A14 F14] [A15 F15] …`."""
    return _in_stages(*(tuple(Sublayer(layer, kind) for kind in KINDS) for layer in span))


STAGGERED, BLOCKS, MERGE = "staggered", "A beside F", "merge"

TRANSFORMATIONS = {
    "shuffle": Transformation("the layers of the span in random order", _random_order, random=True),
    "prune": Transformation("the span left out", lambda span, _: ()),
    MERGE: Transformation(
        "one layer with the mean of the span's weights",
        lambda span, _: (Step(tuple(span), "merge"),),
    ),
    "parallel": Transformation("all layers of the span side by side", _side_by_side(None, "lp")),
    "parallel (PAR)": Transformation(
        "all layers of the span side by side, each layer whole", _side_by_side(None, "par")
    ),
    "2-parallel": Transformation(
        "consecutive pairs of the span side by side", _side_by_side(2, "lp")
    ),
    "2-parallel (PAR)": Transformation(
        "consecutive pairs of the span side by side, each layer whole", _side_by_side(2, "par")
    ),
    "3-parallel": Transformation(
        "consecutive triples of the span side by side", _side_by_side(3, "lp")
    ),
    "3-parallel (PAR)": Transformation(
        "consecutive triples of the span side by side, each layer whole", _side_by_side(3, "par")
    ),
    STAGGERED: Transformation("every FFN beside the next layer's attention", _staggered),
    BLOCKS: Transformation("every FFN beside its own layer's attention", _blocks),
}
"""All transformations. If pairs or triples do not divide a span, its last group is smaller."""

PAIRS = "2-parallel"
"""The transformation that the paper settles on, in the form that a wide layer computes."""

OF_SUBLAYERS = (STAGGERED, BLOCKS)
"""Transformations that change nothing where attention and FFN read the same state."""


def saved(form: str, layers: int) -> int:
    """How many all-reduces a span of layers saves in a form.

    Args:
        form: `PAIRS`, `STAGGERED` or `BLOCKS`.
        layers: Length of the span. Pairs of an odd number save 0: the last layer would be alone.
    """
    if form == PAIRS:
        return layers if layers % 2 == 0 else 0
    return layers - 1 if form == STAGGERED else layers


@dataclass(frozen=True)
class Cell:
    """One transformation of the span of layers `start` to `end - 1`."""

    transformation: str
    start: int
    end: int
    permutation: int = 0
    """Number of the random order; 0 for transformations that are not random."""

    def schedule(self, num_layers: int, seed: int = 0) -> Schedule:
        """The whole model with the span transformed."""
        before, after = in_order(range(self.start)), in_order(range(self.end, num_layers))
        transformed = TRANSFORMATIONS[self.transformation].schedule(
            range(self.start, self.end), f"{seed} {self.permutation}"
        )
        return before + transformed + after


def all_cells(
    num_layers: int,
    *,
    permutations: int = 2,
    stride: int = 1,
    transformations: Sequence[str] = tuple(TRANSFORMATIONS),
) -> Iterator[Cell]:
    """Every transformation of every span that begins and ends at a multiple of `stride`."""
    ends = sorted({*range(0, num_layers, stride), num_layers})
    for name in transformations:
        orders = permutations if TRANSFORMATIONS[name].random else 1
        for start in ends:
            for end in ends:
                if start < end:
                    for permutation in range(orders):
                        yield Cell(name, start, end, permutation)
