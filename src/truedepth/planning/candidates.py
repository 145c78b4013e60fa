"""What a search may merge, by form."""

from __future__ import annotations

from collections.abc import Iterator

from truedepth.plan.stages import FFN, Segment, Sublayer, group_of, group_segment
from truedepth.widening.layout import Layout

STAGGERED, BLOCKS, RUNS, PAIRS = "staggered", "blocks", "runs", "pairs"
FORMS = (PAIRS, STAGGERED, BLOCKS, RUNS)
"""`[F14 A15]`, `[A14 F14]`, longer stages, and groups of layers."""


def form_of(segment: Segment) -> str:
    """Which of `FORMS` a merged segment has."""
    if group_of(segment):
        return PAIRS
    if len(segment[0]) > 2:
        return RUNS
    return STAGGERED if segment[0][0].kind == FFN else BLOCKS


def segments_to_merge(layout: Layout, form: str, max_group: int, max_run: int) -> list[Segment]:
    """Every merged segment that a search may choose, in the order of their first sub-layers.

    Args:
        layout: Of the original as it is.
        form: `auto` for all that the family allows, `pairs` for groups of layers alone.
        max_group: Most layers in a group.
        max_run: Most sub-layers in a stage.
    """
    found = list(_groups(layout.source.num_layers, max_group))
    if form != PAIRS and not layout.why_no_stages:
        found += _stages(layout.source.num_layers, max_run)
    return sorted(found, key=lambda segment: segment[0][0])


def _groups(num_layers: int, most: int) -> Iterator[Segment]:
    for size in range(2, most + 1):
        for first in range(num_layers - size + 1):
            yield group_segment(range(first, first + size))


def _stages(num_layers: int, most: int) -> Iterator[Segment]:
    for size in range(2, most + 1):
        for first in range(2 * num_layers - size + 1):
            yield (tuple(Sublayer.at(position) for position in range(first, first + size)),)
