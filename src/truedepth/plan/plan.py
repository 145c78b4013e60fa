"""Which layers and sub-layers run together. Knows no torch.

A plan is an ordered list of stages, sets of sub-layers that read one state. It is written as groups
of consecutive layers, whose attentions are one stage and whose FFNs are the next (Layer
Parallelism, arXiv 2502.02790), and as stages of neighbouring sub-layers of the other layers, such
as `[F14 A15]`, or rank-local `[F14 | A15]`. Effective depth and Δ are terms of that paper.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.plan.file import read_yaml, write_yaml
from truedepth.plan.spans import check_group, late_pair_groups, span_groups, whole_number
from truedepth.plan.stages import (
    ATTENTION,
    FFN,
    Segment,
    Stage,
    Sublayer,
    check_stage,
    group_segment,
    ranks_of,
    said,
    segments_of,
    stage_of,
    staggered_stages,
    written,
)

MAX_LAYERS = 1024  # eight times the deepest model's; a falsely large number could fill memory


@dataclass(frozen=True, init=False)
class Plan:
    """The stages of a model with layers ``0 … num_layers - 1``."""

    num_layers: int
    groups: tuple[tuple[int, ...], ...]
    """An ordered partition of the layers into groups of consecutive layers."""

    merged: tuple[Stage, ...]
    """The stages of two or more sub-layers whose layers are in groups of one, in order."""

    model: str | None

    def __init__(
        self,
        num_layers: int,
        groups: Iterable[Sequence[int]] = (),
        model: str | None = None,
        stages: Iterable[Iterable[Sublayer | str]] = (),
    ) -> None:
        """Complete `groups` and `stages` with what is in none of them and runs alone.

        Args:
            num_layers: Number of decoder layers of the original model.
            groups: Groups of consecutive layer indices, numbered from 0, in any order.
            model: The name of the model that the plan was made for, for the reader.
            stages: Stages of neighbouring sub-layers, such as `["F14", "A15"]`, in any order; a
                local one is a `LocalStage`, or `{"sublayers": ["F14", "A15"], "local": 2}`.

        Raises:
            TruedepthError: A layer or sub-layer is out of range or in two groups or stages, one of
                these is empty or has a gap, local stages are for different numbers of ranks, or
                `num_layers` is out of range.
        """
        num_layers = whole_number(num_layers)
        if num_layers < 1:
            raise TruedepthError(f"A plan needs at least 1 layer, not {num_layers}.")
        if num_layers > MAX_LAYERS:
            raise TruedepthError(
                f"{num_layers} layers are more than a plan may have ({MAX_LAYERS})."
            )
        owner: dict[int, tuple[int, ...]] = {}
        for layers in groups:
            group = tuple(map(whole_number, layers))
            check_group(group, num_layers)
            for layer in group:
                if layer in owner:
                    raise TruedepthError(
                        f"Layer {layer} is in two groups, {list(owner[layer])} and {list(group)};"
                        " a layer can be in one group only."
                    )
                owner[layer] = group
        complete = sorted({owner.get(layer, (layer,)) for layer in range(num_layers)})
        object.__setattr__(self, "num_layers", num_layers)
        object.__setattr__(self, "groups", tuple(complete))
        object.__setattr__(self, "merged", self._checked(stages))
        object.__setattr__(self, "model", model)

    def _checked(self, stages: Iterable[Iterable[Sublayer | str]]) -> tuple[Stage, ...]:
        """The stages of two or more sub-layers, in order."""
        together = {layer: group for group in self.groups if len(group) > 1 for layer in group}
        owner: dict[Sublayer, Stage] = {}
        for names in stages:
            stage = stage_of(names)
            check_stage(stage, self.num_layers)
            for sublayer in stage:
                if sublayer in owner:
                    raise TruedepthError(
                        f"{sublayer} is in two stages, {said(owner[sublayer])} and {said(stage)}; a"
                        " sub-layer can be in one stage only."
                    )
                if sublayer.layer in together:
                    raise TruedepthError(
                        f"{sublayer} is in the stage {said(stage)} and, with its layer, in the"
                        f" group {list(together[sublayer.layer])}; it can be in one of them only."
                    )
                owner[sublayer] = stage
        merged = sorted({stage for stage in owner.values() if len(stage) > 1})
        numbers = sorted({ranks for stage in merged if (ranks := ranks_of(stage)) is not None})
        if len(numbers) > 1:
            raise TruedepthError(
                f"Local stages of a plan are for one number of ranks, not for {numbers[0]} and"
                f" {numbers[1]}."
            )
        return tuple(merged)

    @classmethod
    def staggered(
        cls,
        num_layers: int,
        first: int,
        last: int,
        model: str | None = None,
        ranks: int | None = None,
    ) -> Plan:
        """Every FFN of layers `first` to `last` inclusive runs beside the next one's attention.

        The stages of the span are `[A14] [F14 A15] … [F26 A27] [F27]` for layers 14 to 27. With a
        number of ranks they are local: `[F14 | A15]`.

        Raises:
            TruedepthError: The span leaves the model, or holds less than two layers.
        """
        span_groups(num_layers, first, last, 1)
        if first == last:
            raise TruedepthError(f"The span {first}-{last} holds one layer; give at least two.")
        return cls(num_layers, model=model, stages=staggered_stages(first, last, ranks))

    @classmethod
    def span(
        cls, num_layers: int, first: int, last: int, group: int = 2, model: str | None = None
    ) -> Plan:
        """Layers `first` to `last` inclusive in consecutive groups of `group` (the paper's form).

        Raises:
            TruedepthError: The span leaves the model, or its length is not a multiple of `group`.
        """
        return cls(num_layers, span_groups(num_layers, first, last, group), model)

    @classmethod
    def late_pairs(cls, num_layers: int, pairs: int, model: str | None = None) -> Plan:
        """`pairs` consecutive pairs that leave the last two layers alone, where they fit.

        The paper's rule of thumb: late-middle layers pair best, and the best end of the span hardly
        depends on how many are paired. It uses no measurement of the model.

        Raises:
            TruedepthError: More pairs than the model has.
        """
        return cls(num_layers, late_pair_groups(num_layers, pairs), model)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage, in the order in which they run."""
        merged = {stage[0]: stage for stage in self.merged}
        inside = {sublayer for stage in self.merged for sublayer in stage[1:]}
        found: list[Stage] = []
        for group in self.groups:
            for stage in group_segment(group):
                if stage[0] not in inside:
                    found.append(merged.get(stage[0], stage))
        return tuple(found)

    @property
    def ranks(self) -> int | None:
        """The number of ranks that its local stages are for; None if it has none."""
        return next(filter(None, map(ranks_of, self.merged)), None)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The stages, cut wherever the original has run the same sub-layers."""
        return tuple(segments_of(self.stages))

    @property
    def effective_depth(self) -> int | float:
        """Half the number of stages: for groups of layers alone, the number of groups."""
        stages = len(self.stages)
        return stages / 2 if stages % 2 else stages // 2

    @property
    def paired_layers(self) -> int:
        """Δ: number of original layers inside groups of two or more."""
        return sum(len(group) for group in self.groups if len(group) > 1)

    @property
    def unpaired(self) -> Plan:
        """The original's plan: every layer alone."""
        return Plan(self.num_layers, model=self.model)

    @property
    def widths(self) -> list[int]:
        """Width of every layer of the converted model, as a multiple of an original layer."""
        return [len(group) for group in self.groups]

    @property
    def all_reduces(self) -> int:
        """All-reduces per token in the decoder layers, over any number of ranks above 1.

        One per stage; in an original two per layer, after attention and FFN (Megatron-LM's
        sharding).
        """
        return len(self.stages)

    def __str__(self) -> str:
        """One line, for example ``0 1 [2+3] [4+5] 6`` or ``0 1 … 13 · A14 [F14 A15] F15 · 16 17``.

        Long runs of single layers and of staggered stages are shortened.
        """
        staggered = {sublayer.layer for stage in self.merged for sublayer in stage}
        parts: list[list[str]] = []
        for apart, groups in itertools.groupby(self.groups, lambda group: group[0] in staggered):
            layers = {layer for group in groups for layer in group}
            inside = [stage for stage in self.stages if stage[0].layer in layers]
            parts.append(_drawn_stages(inside) if apart else _drawn_groups(layers, self.groups))
        return " · ".join(" ".join(words) for words in parts)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, in the form of the plan file."""
        groups = [list(group) for group in self.groups if len(group) > 1]
        head = {"model": self.model} if self.model else {}
        tail = {"stages": [*map(written, self.merged)]} if self.merged else {}
        return {**head, "num_layers": self.num_layers, "groups": groups, **tail}

    @classmethod
    def from_dict(cls, data: object, where: str = "the plan") -> Plan:
        """Read what `to_dict` wrote; `where` names the data's origin in errors.

        Raises:
            TruedepthError: A key is missing, unknown, or of another type, or the plan is not valid.
        """
        if not isinstance(data, dict):
            raise TruedepthError(f"{where} is not a plan: it needs the keys num_layers and groups.")
        unknown = sorted(map(str, set(data) - {"model", "num_layers", "groups", "stages"}))
        if unknown:
            raise TruedepthError(
                f"{where} has the unknown key {reprlib.repr(unknown[0])}; a plan has the keys"
                " model, num_layers, groups and stages."
            )
        needed = ("num_layers",) if "stages" in data else ("num_layers", "groups")
        if missing := [key for key in needed if key not in data]:
            raise TruedepthError(f"{where} lacks the key {missing[0]!r}.")
        groups, stages, model = data.get("groups", []), data.get("stages", []), data.get("model")
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            raise TruedepthError(
                f"{where}: groups must be a list of lists of layers, such as [[14, 15], [16, 17]]."
            )
        kinds = (list, dict)
        if not isinstance(stages, list) or not all(isinstance(stage, kinds) for stage in stages):
            raise TruedepthError(
                f"{where}: stages must be a list of lists of sub-layers, such as [[F14, A15]]."
            )
        if model is not None and not isinstance(model, str):
            raise TruedepthError(f"{where}: model must be text, not {reprlib.repr(model)}.")
        return cls(data["num_layers"], groups, model, stages)

    def to_yaml(self, path: str | Path) -> None:
        """Write the plan file."""
        write_yaml(Path(path), self.to_dict())

    @classmethod
    def from_yaml(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            TruedepthError: The file is missing, not YAML, or not a valid plan.
        """
        return cls.from_dict(read_yaml(Path(path)), str(path))


def _drawn_groups(layers: set[int], groups: Iterable[Sequence[int]]) -> list[str]:
    """Layers alone and in groups; long runs of layers alone are shortened."""
    words: list[str] = []
    inside = [group for group in groups if group[0] in layers]
    for alone, run in itertools.groupby(inside, lambda group: len(group) == 1):
        names = ["+".join(map(str, group)) for group in run]
        if not alone:
            words += [f"[{name}]" for name in names]
        else:
            words += names if len(names) <= 4 else [*names[:2], "…", names[-1]]
    return words


def _drawn_stages(stages: Iterable[Stage]) -> list[str]:
    """Stages; long runs of `[Fk Ak+1]` are shortened."""
    words: list[str] = []
    for form, run in itertools.groupby(stages, _form):
        names = [said(stage) for stage in run]
        short = form[0] != [FFN, ATTENTION] or len(names) <= 4
        words += names if short else [*names[:2], "…", names[-1]]
    return words


def _form(stage: Stage) -> tuple[list[str], int | None]:
    """What neighbouring stages have in common that are drawn as one run."""
    return [each.kind for each in stage], ranks_of(stage)
