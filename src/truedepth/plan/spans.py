"""Spans of layers: how they are written, checked, and cut into groups."""

from __future__ import annotations

import itertools
import operator
import re
import reprlib

from truedepth.errors import TruedepthError


def span_groups(num_layers: int, first: int, last: int, group: int) -> list[tuple[int, ...]]:
    """Layers `first` to `last` inclusive in consecutive groups of `group`; see `Plan.span`."""
    if group < 1:
        raise TruedepthError(f"A group needs at least 1 layer, not {group}.")
    check_group((first,), num_layers)
    check_group((last,), num_layers)
    length = last - first + 1
    if length < 1:
        raise TruedepthError(
            f"The span {first}-{last} is empty: its last layer comes before its first."
        )
    if length % group:
        shorter, longer = last - length % group, last + group - length % group
        ends = [str(end) for end in (shorter, longer) if first < end < num_layers]
        raise TruedepthError(
            f"The span {first}-{last} has length {length}, which is not divisible by the group size"
            f" {group}" + (f"; end it at layer {' or '.join(ends)}." if ends else ".")
        )
    return [tuple(range(start, start + group)) for start in range(first, last + 1, group)]


def late_pair_groups(num_layers: int, pairs: int) -> list[tuple[int, int]]:
    """Consecutive pairs that leave the last two layers alone; see `Plan.late_pairs`."""
    if not 0 <= pairs <= num_layers // 2:
        raise TruedepthError(
            f"{pairs} pairs are not possible: {num_layers} layers allow 0 to {num_layers // 2}."
        )
    first = max(num_layers - 2 - 2 * pairs, min(2, num_layers - 2 * pairs), 0)
    starts = range(first, first + 2 * pairs, 2)
    return [(start, start + 1) for start in starts]


def parse_span(text: str) -> tuple[int, int]:
    """``"14-27"`` as ``(14, 27)``: layers 14 to 27, inclusive.

    Raises:
        TruedepthError: The text has another form.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*-\s*(\d{1,6})\s*", text)
    if match is None:
        raise TruedepthError(f"{text!r} is not a span of layers; write it as 14-27.")
    return int(match[1]), int(match[2])


def whole_number(value: object) -> int:
    """A value of any integer type, such as NumPy's, as an int.

    Raises:
        TruedepthError: It is not an integer, or has more than 63 bits.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TruedepthError(
            f"Layers must be given as whole numbers, not {reprlib.repr(value)}."
        ) from None
    if number.bit_length() > 63:  # printing one of very many digits is slow or fails
        raise TruedepthError(f"An integer of {number.bit_length()} bits cannot name a layer.")
    return number


def check_group(group: tuple[int, ...], num_layers: int) -> None:
    """Raise TruedepthError if a group is empty, has a gap, or names a layer out of range."""
    if not group:
        raise TruedepthError("A group is empty; it needs at least one layer.")
    for layer in group:
        if not 0 <= layer < num_layers:
            raise TruedepthError(
                f"Layer {layer} is out of range: the model has layers 0 to {num_layers - 1}."
            )
    for before, after in itertools.pairwise(group):
        if after != before + 1:
            raise TruedepthError(
                f"Group {list(group)} is not consecutive: layer {before} is followed by layer"
                f" {after} instead of layer {before + 1}."
            )
