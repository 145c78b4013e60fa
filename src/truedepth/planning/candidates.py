"""What a search may merge, by form, and which of it is worth refitting."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from truedepth.errors import TruedepthError
from truedepth.plan.choose import Costs, cheapest_plans, plan_of_segments
from truedepth.plan.plan import Plan
from truedepth.plan.stages import (
    FFN,
    LocalStage,
    Segment,
    Stage,
    Sublayer,
    group_of,
    group_segment,
    is_of_whole_layers,
    sublayers_of,
)
from truedepth.planning.options import Merges
from truedepth.widening.layout import Layout

STAGGERED, BLOCKS, RUNS, PAIRS, LOCAL = "staggered", "blocks", "runs", "pairs", "local"
FORMS = (PAIRS, STAGGERED, BLOCKS, RUNS, LOCAL)
"""Groups of layers, `[F14 A15]`, `[A14 F14]`, longer stages, and rank-local stages."""

HOPELESS = 4  # times the loss of other merges in the same place


def form_of(segment: Segment) -> str:
    """Which of `FORMS` a merged segment has."""
    if group_of(segment):
        return PAIRS
    if isinstance(segment[0], LocalStage):
        return LOCAL
    if len(segment[0]) > 2:
        return RUNS
    return STAGGERED if segment[0][0].kind == FFN else BLOCKS


def segments_to_merge(
    layout: Layout, merges: Merges, seconds: Callable[[Plan], float] | None = None
) -> list[Segment]:
    """Every merged segment that a search may choose, in the order of their first sub-layers.

    Args:
        layout: Of the original as it is.
        merges: Which of all that the family allows.
        seconds: What a plan takes; merges that alone save no time are left out.

    Raises:
        TruedepthError: None saves time.
    """
    num_layers = layout.source.num_layers
    found = list(_groups(num_layers, merges.max_group))
    stages: list[Stage] = []
    if merges.form != PAIRS and layout.is_parallel:
        found = []
        stages = [*filter(is_of_whole_layers, _stages(num_layers, 2 * merges.max_group))]
    elif merges.form != PAIRS:
        found = [each for each in found if _can_be_joined(layout, each)]
        stages = [*_stages(num_layers, merges.max_run)]
    found += [(stage,) for stage in stages]
    if (ranks := merges.local) is not None:
        found += [(LocalStage(each, ranks),) for each in stages if not layout.is_exact(each)]
    if seconds is not None:
        found = _faster(num_layers, found, seconds)
    return sorted(found, key=lambda segment: segment[0][0])


def _can_be_joined(layout: Layout, group: Segment) -> bool:
    """Whether a group becomes one wide layer; layers side by side would save nothing."""
    try:
        return layout.is_merged(group) and bool(layout.wide_layer(group_of(group)))
    except TruedepthError:
        return False


def _groups(num_layers: int, most: int) -> Iterator[Segment]:
    for size in range(2, most + 1):
        for first in range(num_layers - size + 1):
            yield group_segment(range(first, first + size))


def _stages(num_layers: int, most: int) -> Iterator[Stage]:
    for size in range(2, most + 1):
        for first in range(2 * num_layers - size + 1):
            yield tuple(Sublayer.at(position) for position in range(first, first + size))


def _faster(
    num_layers: int, segments: list[Segment], seconds: Callable[[Plan], float]
) -> list[Segment]:
    original = seconds(Plan(num_layers))
    found = [each for each in segments if seconds(plan_of_segments(num_layers, [each])) < original]
    if not found:
        raise TruedepthError("No merge saves time there, so no plan is faster than the original.")
    return found


def promising(num_layers: int, raw: Costs) -> list[Segment]:
    """The merges that are worth refitting, by what each loses as it is.

    One is not if others in its place, a sub-layer more at either side, save as many stages and lose
    less than `1 / HOPELESS` of its loss: refitting rarely repairs one so much better than others.

    Args:
        num_layers: Of the original.
        raw: What every merge loses, as it is.
    """
    return [s for s, loss in raw.items() if loss <= HOPELESS * _least(num_layers, s, raw)]


def _least(num_layers: int, segment: Segment, raw: Costs) -> float:
    """The least loss with which merges in a segment's place save as many stages as it does."""
    first, *_, last = sublayers_of(segment)
    near = {
        other: loss
        for other, loss in raw.items()
        if first.position - 1 <= other[0][0].position
        if sublayers_of(other)[-1].position <= last.position + 1
    }
    saved = len(sublayers_of(segment)) - len(segment)
    (plan,) = cheapest_plans(num_layers, near)[2 * num_layers - saved]
    return sum(near.get(each, 0.0) for each in plan.segments)
