"""Which layers run together. Knows no torch.

A plan is an ordered partition of a model's layers into groups of consecutive layers. A group of one
is a layer that stays as it is; a group of n becomes one layer n times as wide. Effective depth and
Δ are terms of the paper (arXiv 2502.02790).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.plan.file import read_yaml, write_yaml
from truedepth.plan.spans import check_group, late_pair_groups, span_groups, whole_number

MAX_LAYERS = 1024  # eight times the deepest model's; a falsely large number could fill memory


@dataclass(frozen=True, init=False)
class Plan:
    """An ordered partition of layers ``0 … num_layers - 1`` into groups of consecutive layers."""

    num_layers: int
    groups: tuple[tuple[int, ...], ...]
    model: str | None

    def __init__(
        self, num_layers: int, groups: Iterable[Sequence[int]] = (), model: str | None = None
    ) -> None:
        """Complete `groups` with the layers that are in none of them, which run alone.

        Args:
            num_layers: Number of decoder layers of the original model.
            groups: Groups of consecutive layer indices, numbered from 0, in any order.
            model: The name of the model that the plan was made for, for the reader.

        Raises:
            TruedepthError: A layer is out of range or in two groups, a group is empty or has a
                gap, or `num_layers` is out of range.
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
        object.__setattr__(self, "model", model)

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
    def effective_depth(self) -> int:
        """Number of layers that run one after another: one per group."""
        return len(self.groups)

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

        Two per layer, after attention and after the FFN (Megatron-LM's sharding).
        """
        return 2 * self.effective_depth

    def __str__(self) -> str:
        """One line, for example ``0 1 [2+3] [4+5] 6``; long runs of single layers as ``0 … 13``."""
        words: list[str] = []
        singles: list[int] = []
        for group in (*self.groups, None):
            if group is not None and len(group) == 1:
                singles.append(group[0])
                continue
            if len(singles) > 4:
                words += [str(singles[0]), str(singles[1]), "…", str(singles[-1])]
            else:
                words += map(str, singles)
            singles = []
            if group is not None:
                words.append("[" + "+".join(map(str, group)) + "]")
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, in the form of the plan file."""
        groups = [list(group) for group in self.groups if len(group) > 1]
        head = {"model": self.model} if self.model else {}
        return {**head, "num_layers": self.num_layers, "groups": groups}

    @classmethod
    def from_dict(cls, data: object, where: str = "the plan") -> Plan:
        """Read what `to_dict` wrote; `where` names the data's origin in errors.

        Raises:
            TruedepthError: A key is missing, unknown, or of another type, or the plan is not valid.
        """
        if not isinstance(data, dict):
            raise TruedepthError(f"{where} is not a plan: it needs the keys num_layers and groups.")
        unknown = sorted(map(str, set(data) - {"model", "num_layers", "groups"}))
        if unknown:
            raise TruedepthError(
                f"{where} has the unknown key {reprlib.repr(unknown[0])}; a plan has the keys"
                " model, num_layers and groups."
            )
        missing = [key for key in ("num_layers", "groups") if key not in data]
        if missing:
            raise TruedepthError(f"{where} lacks the key {missing[0]!r}.")
        groups, model = data["groups"], data.get("model")
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            raise TruedepthError(
                f"{where}: groups must be a list of lists of layers, such as [[14, 15], [16, 17]]."
            )
        if model is not None and not isinstance(model, str):
            raise TruedepthError(f"{where}: model must be text, not {reprlib.repr(model)}.")
        return cls(data["num_layers"], groups, model)

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
