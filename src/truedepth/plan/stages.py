"""Sub-layers, and the stages in which they read one state.

A decoder layer k is two sub-layers, its attention `Ak` and its FFN `Fk`. Each adds to the residual
stream what it computes from it. A stage is a set of sub-layers that read the same state; under
tensor parallelism it costs one all-reduce. In an original every sub-layer is a stage of its own.

In a rank-local stage, `[F14 | A15]`, every rank goes on with what it has written itself: there a
sub-layer reads the state and the rank's own parts of what the sub-layers before it add.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from truedepth.errors import TruedepthError

Kind = Literal["attention", "ffn"]
KINDS: tuple[Kind, Kind] = ("attention", "ffn")
ATTENTION, FFN = KINDS


@dataclass(frozen=True, order=True)
class Sublayer:
    """The attention or the FFN of a layer; ordered as an original runs them: A0 F0 A1 F1 …"""

    layer: int
    kind: Kind

    def __str__(self) -> str:
        return f"{'F' if self.kind == FFN else 'A'}{self.layer}"

    @property
    def position(self) -> int:
        """Its place in the original's order: 0 for A0, 1 for F0, 2 for A1, …"""
        return 2 * self.layer + (self.kind == FFN)

    @classmethod
    def at(cls, position: int) -> Sublayer:
        """The sub-layer at a place in the original's order."""
        return cls(position // 2, FFN if position % 2 else ATTENTION)

    @classmethod
    def parse(cls, text: object) -> Sublayer:
        """`A14` or `F14`.

        Raises:
            TruedepthError: The text has another form.
        """
        match = re.fullmatch(r"([AF])(\d{1,6})", text) if isinstance(text, str) else None
        if match is None:
            raise TruedepthError(
                f"{reprlib.repr(text)} is not a sub-layer; write the attention of layer 14 as A14"
                " and its FFN as F14."
            )
        return cls(int(match[2]), ATTENTION if match[1] == "A" else FFN)


Stage = tuple[Sublayer, ...]
"""Sub-layers that end in one all-reduce, in the original's order: they read one state, or the stage
is a `LocalStage`."""


class LocalStage(Stage):
    """Sub-layers that run one after another on each of a number of ranks, `[F14 | A15]`:

        y = x + Σ_r p_r        p_r = Σ_i s_i^r(N_i (x + p_r so far))

    s_i^r is rank r's part of sub-layer i: that of its heads, or of its columns of an FFN.
    """

    ranks: int
    """Number of tensor-parallel ranks that the stage is for; at least 2."""

    def __new__(cls, sublayers: Iterable[Sublayer], ranks: int) -> LocalStage:
        """Make the sub-layers local to so many ranks.

        Raises:
            TruedepthError: There are fewer than two ranks, or more than `MAX_RANKS`.
        """
        if type(ranks) is not int or not 2 <= ranks <= MAX_RANKS:
            raise TruedepthError(
                f"A local stage is for 2 to {MAX_RANKS} tensor-parallel ranks, not"
                f" {reprlib.repr(ranks)}."
            )
        stage = super().__new__(cls, sublayers)
        stage.ranks = ranks
        return stage

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.ranks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalStage) and self._key == other._key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Stage, int]:
        return tuple(self), self.ranks


MAX_RANKS = 1024  # more than any machine's; a falsely large number could fill memory

Segment = tuple[Stage, ...]
"""Stages that hold neighbouring sub-layers: a sub-layer alone, a stage of several, or the two
stages of a group of layers. Original and converted model have run the same behind each segment."""


def segments_of(stages: Iterable[Stage]) -> list[Segment]:
    """Stages in the order in which they run, cut into segments as short as they can be."""
    found: list[Segment] = []
    running: list[Stage] = []
    done, furthest = 0, 0
    for stage in stages:
        running.append(stage)
        done, furthest = done + len(stage), max(furthest, stage[-1].position + 1)
        if done == furthest:
            found.append(tuple(running))
            running = []
    return found


def sublayers_of(segment: Segment) -> list[Sublayer]:
    """A segment's sub-layers in the original's order."""
    return sorted(each for stage in segment for each in stage)


def group_of(segment: Segment) -> tuple[int, ...]:
    """The layers of a segment that is a group; empty for any other."""
    return tuple(each.layer for each in segment[0]) if len(segment) > 1 else ()


def group_segment(group: Iterable[int]) -> Segment:
    """The two stages of a group of layers."""
    layers = tuple(group)
    return tuple(tuple(Sublayer(layer, kind) for layer in layers) for kind in KINDS)


def stage_of(names: Iterable[object] | Mapping[str, Any]) -> Stage:
    """`["F14", "A15"]`, or `{"sublayers": ["F14", "A15"], "local": 2}`, as a stage.

    Raises:
        TruedepthError: A name is not a sub-layer's, or the mapping has other keys.
    """
    if isinstance(names, Mapping):
        sublayers = names.get("sublayers")
        if set(names) != {"sublayers", "local"} or not isinstance(sublayers, list):
            raise TruedepthError(
                f"{reprlib.repr(names)} is not a stage; write a rank-local one as"
                " {sublayers: [F14, A15], local: 2}."
            )
        return LocalStage(stage_of(sublayers), names["local"])
    stage = tuple(name if isinstance(name, Sublayer) else Sublayer.parse(name) for name in names)
    ranks = ranks_of(names)
    return stage if ranks is None else LocalStage(stage, ranks)


def written(stage: Stage, at: Mapping[int, int] | None = None) -> list[str] | dict[str, Any]:
    """A stage as `stage_of` reads it.

    Args:
        stage: A stage.
        at: The numbers to write instead of its layers' own.
    """
    names = [str(each if at is None else Sublayer(at[each.layer], each.kind)) for each in stage]
    ranks = ranks_of(stage)
    return names if ranks is None else {"sublayers": names, "local": ranks}


def ranks_of(stage: object) -> int | None:
    """The number of ranks that a local stage is for; None for any other stage."""
    return stage.ranks if isinstance(stage, LocalStage) else None


def said(stage: Sequence[Sublayer]) -> str:
    """`[F14 A15]`, local `[F14 | A15]`; a sub-layer alone without brackets."""
    names = (" " if ranks_of(stage) is None else " | ").join(map(str, stage))
    return f"[{names}]" if len(stage) > 1 else names


def parts_of(stage: Stage) -> list[Stage]:
    """A stage cut into parts of at most one attention: attentions differ in caches and masks."""
    parts: list[list[Sublayer]] = [[]]
    for sublayer in stage:
        if sublayer.kind == ATTENTION and any(each.kind == ATTENTION for each in parts[-1]):
            parts.append([])
        parts[-1].append(sublayer)
    return list(map(tuple, parts))


def home_of(part: Stage) -> int:
    """The layer in which a part of a stage runs: that of its attention, if it has one."""
    return next((each for each in part if each.kind == ATTENTION), part[0]).layer


def whole_layer(layer: int) -> Stage:
    """`[A14 F14]`."""
    return tuple(Sublayer(layer, kind) for kind in KINDS)


def is_of_whole_layers(stage: Stage) -> bool:
    """Whether a stage holds attention and FFN of each of its layers: `[A2 F2]`, `[A2 F2 A3 F3]`."""
    return stage[0].kind == ATTENTION and stage[-1].kind == FFN


def staggered_stages(first: int, last: int, ranks: int | None = None) -> list[Stage]:
    """The stages `[Fk Ak+1]` between neighbouring layers of a span, `first` to `last` inclusive.

    With a number of ranks they are local, `[Fk | Ak+1]`.
    """
    stages = [(Sublayer(k, FFN), Sublayer(k + 1, ATTENTION)) for k in range(first, last)]
    return [stage if ranks is None else LocalStage(stage, ranks) for stage in stages]


def check_stage(stage: Stage, num_layers: int) -> None:
    """Refuse a stage that is empty, leaves the model, or is not of neighbours in their order.

    Raises:
        TruedepthError: It is; the sentence names the sub-layer.
    """
    if not stage:
        raise TruedepthError("A stage is empty; it needs at least one sub-layer.")
    for sublayer in stage:
        if not 0 <= sublayer.layer < num_layers:
            raise TruedepthError(
                f"{sublayer} is out of range: the model has layers 0 to {num_layers - 1}."
            )
    for before, after in itertools.pairwise(stage):
        if after.position != before.position + 1:
            raise TruedepthError(
                f"In the stage {said(stage)} {before} is followed by {after} instead of"
                f" {Sublayer.at(before.position + 1)}; a stage holds neighbours, in their order."
            )
