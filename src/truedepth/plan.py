"""Which layers run together. Knows no torch.

A plan is an ordered partition of a model's layers into groups of consecutive layers; a group of one
is a layer that stays as it is, a group of n becomes one layer n times as wide. Effective depth and
Δ are the terms of the paper (arXiv 2502.02790).
"""

from __future__ import annotations

import itertools
import operator
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from truedepth.errors import TruedepthError

MAX_PLAN_BYTES = 1 << 16  # a plan for 1,000 layers takes about 10 kB
MAX_LAYERS = 1024  # eight times the deepest model; lists as long as a false number fill memory


@dataclass(frozen=True, init=False)
class Plan:
    """An ordered partition of layers ``0 … num_layers - 1`` into groups of consecutive layers."""

    num_layers: int
    groups: tuple[tuple[int, ...], ...]
    model: str | None

    def __init__(
        self, num_layers: int, groups: Iterable[Sequence[int]] = (), model: str | None = None
    ) -> None:
        """Complete `groups` with the layers named nowhere, which run alone.

        Args:
            num_layers: Number of decoder layers of the original model.
            groups: Groups of consecutive layer indices, numbered from 0, in any order.
            model: The model that the plan was made for, for the reader's information.

        Raises:
            TruedepthError: A layer out of range, in two groups, or a group with a gap.
        """
        num_layers = _whole(num_layers)
        if num_layers < 1:
            raise TruedepthError(
                f"A plan needs a number of layers of at least 1, not {num_layers!r}."
            )
        if num_layers > MAX_LAYERS:
            raise TruedepthError(f"{num_layers} layers are more than any model has.")
        owner: dict[int, tuple[int, ...]] = {}
        for layers in groups:
            group = tuple(map(_whole, layers))
            _check_group(group, num_layers)
            for layer in group:
                if layer in owner:
                    raise TruedepthError(
                        f"Layer {layer} is in two groups, {list(owner[layer])} and {list(group)};"
                        " every layer can be in one group only."
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
        if group < 1:
            raise TruedepthError(f"A group needs at least 1 layer, not {group}.")
        _check_group((first,), num_layers)
        _check_group((last,), num_layers)
        length = last - first + 1
        if length < 1:
            raise TruedepthError(
                f"The span {first}-{last} is empty: its last layer comes before its first."
            )
        if length % group:
            shorter, longer = last - length % group, last + group - length % group
            ends = [str(end) for end in (shorter, longer) if first < end < num_layers]
            raise TruedepthError(
                f"The span {first}-{last} has length {length}, which groups of {group} do not"
                " divide" + (f"; end it at layer {' or '.join(ends)}." if ends else ".")
            )
        groups = [tuple(range(start, start + group)) for start in range(first, last + 1, group)]
        return cls(num_layers, groups, model)

    @classmethod
    def late_pairs(cls, num_layers: int, pairs: int, model: str | None = None) -> Plan:
        """`pairs` consecutive pairs ending two layers before the last one where they fit.

        The paper's rule of thumb: late-middle layers pair best, and the best end of the span hardly
        depends on how many are paired. Depends on no measurement of this model.

        Raises:
            TruedepthError: More pairs than the model has.
        """
        if not 0 <= pairs <= num_layers // 2:
            raise TruedepthError(
                f"{pairs} pairs are not possible: {num_layers} layers allow 0 to {num_layers // 2}."
            )
        first = max(num_layers - 2 - 2 * pairs, min(2, num_layers - 2 * pairs), 0)
        starts = range(first, first + 2 * pairs, 2)
        return cls(num_layers, [(start, start + 1) for start in starts], model)

    @property
    def effective_depth(self) -> int:
        """Number of layers that run one after another: one a group."""
        return len(self.groups)

    @property
    def paired_layers(self) -> int:
        """Δ: number of original layers inside groups of two or more."""
        return sum(len(group) for group in self.groups if len(group) > 1)

    @property
    def unpaired(self) -> Plan:
        """The original: every layer alone."""
        return Plan(self.num_layers, model=self.model)

    @property
    def widths(self) -> list[int]:
        """Width of every layer of the converted model, as a multiple of an original layer."""
        return [len(group) for group in self.groups]

    def all_reduces_per_token(self, tp: int) -> int:
        """All-reduces in the decoder layers for one token at tensor-parallel size `tp`.

        Two a layer (after attention and after the FFN, Megatron-LM's sharding), none on one device.
        """
        if tp < 1:
            raise TruedepthError(f"Tensor-parallel size must be at least 1, not {tp}.")
        return 2 * self.effective_depth if tp > 1 else 0

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
        """Read what `to_dict` wrote; `where` names its place in errors.

        Raises:
            TruedepthError: A key is missing, unknown, or of another type.
        """
        if not isinstance(data, dict):
            raise TruedepthError(f"{where} is not a plan: it needs the keys num_layers and groups.")
        unknown = sorted(map(str, set(data) - {"model", "num_layers", "groups"}))
        if unknown:
            raise TruedepthError(
                f"{where} has the unknown key {reprlib.repr(unknown[0])}; a plan has model,"
                " num_layers, groups."
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
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Plan:
        """Read a plan file.

        Raises:
            TruedepthError: The file is missing, not YAML, or not a valid plan.
        """
        path = Path(path)
        try:
            if path.exists() and not path.is_file():
                raise TruedepthError(f"{path} is no file.")
            if path.stat().st_size > MAX_PLAN_BYTES:
                raise TruedepthError(f"{path} is too large for a plan file ({MAX_PLAN_BYTES} B).")
            data = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        except OSError as error:
            raise TruedepthError(f"Cannot read the plan {path}: {error.strerror}.") from error
        except TruedepthError:
            raise
        except Exception as error:  # PyYAML lets through what a false date or number raises
            raise TruedepthError(f"{path} is not valid YAML.") from error
        return cls.from_dict(data, str(path))


def plan_of(config: Mapping[str, Any]) -> Plan | None:
    """The plan of a converted checkpoint, from its config.json; None for any other model."""
    widths = config.get("layer_widths")
    if not isinstance(widths, list) or not all(type(width) is int for width in widths):
        return None
    if not all(1 <= width <= MAX_LAYERS for width in widths) or len(widths) > MAX_LAYERS:
        raise TruedepthError(f"The layer_widths {reprlib.repr(widths)} are no widths of layers.")
    Plan(sum(widths))  # refuses too many
    layers = iter(range(sum(widths)))
    sizes = [sum(widths[index] for index in place) for place in places_of(config)]
    return Plan(sum(widths), [[next(layers) for _ in range(size)] for size in sizes])


def places_of(config: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The layers of a model that stand for each group of its plan, by its config.json.

    A wide layer stands for a group by itself; the layers of a branch group are as many as it has.
    An original's layers stand for themselves.

    Raises:
        TruedepthError: `side_by_side` has no groups of consecutive layers.
    """
    depth = len(config.get("layer_widths") or range(config["num_hidden_layers"]))
    branches: dict[int, tuple[int, ...]] = {}
    groups = config.get("side_by_side") or []
    try:
        for group in Plan(depth, groups).groups if groups else ():
            if len(group) > 1:
                branches[group[0]] = group
    except (TruedepthError, TypeError) as error:
        raise TruedepthError(
            f"The side_by_side of a config is no list of groups: {error}"
        ) from error
    inside = {index for group in branches.values() for index in group[1:]}
    return [branches.get(index, (index,)) for index in range(depth) if index not in inside]


def paired_places(config: Mapping[str, Any]) -> set[int]:
    """The layers of a converted model that stand for, or are in, groups of two and more."""
    plan = plan_of(config)
    groups = plan.groups if plan else ()
    return {
        index
        for group, place in zip(groups, places_of(config), strict=True)
        if len(group) > 1
        for index in place
    }


def parse_span(text: str) -> tuple[int, int]:
    """``"14-27"`` as ``(14, 27)``: layers 14 to 27, inclusive.

    Raises:
        TruedepthError: The text has another form.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*-\s*(\d{1,6})\s*", text)
    if match is None:
        raise TruedepthError(f"{text!r} is not a span of layers; write it as 14-27.")
    return int(match[1]), int(match[2])


class _PlainLoader(yaml.SafeLoader):
    """Without aliases: a few bytes of them stand for gigabytes, and a plan has no use for them."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def _whole(value: object) -> int:
    """A whole number of any type that is one, such as NumPy's."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TruedepthError(
            f"{reprlib.repr(value)} is not a whole number, as layers are."
        ) from None
    if number.bit_length() > 63:  # printing one of many digits takes its time or fails
        raise TruedepthError(f"A number of {number.bit_length()} bits is no number of a layer.")
    return number


def _check_group(group: tuple[int, ...], num_layers: int) -> None:
    if not group:
        raise TruedepthError("A group is empty; name at least one layer in it.")
    for layer in group:
        if not 0 <= layer < num_layers:
            raise TruedepthError(
                f"Layer {layer} is out of range: the model has layers 0 to {num_layers - 1}."
            )
    for before, after in itertools.pairwise(group):
        if after != before + 1:
            raise TruedepthError(
                f"Group {list(group)} is not consecutive: layer {after} follows layer {before}"
                f" where layer {before + 1} should."
            )
