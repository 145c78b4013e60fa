"""The text of a calibration, cut into windows that it is fitted to, measured and checked on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.sources import Source
from truedepth.text import check_window, default_text, read_text, token_windows

RESERVED = 8  # one window in so many of a text is kept to measure on, and one for checks


@dataclass(frozen=True)
class CalibrationText:
    """Token windows for three uses, none in two of them; each `[windows, window]` int64.

    Where in a text those of one use are drawn from does not depend on the others, so a search and a
    calibration on the same text agree.
    """

    fitted: Tensor
    """What the maps are solved on."""

    measured: Tensor
    """What plans are compared on."""

    check: Tensor
    """Never looked at before the end."""


def calibration_text(
    source: Source,
    paths: Sequence[str | Path],
    *,
    tokens: int,
    window: int,
    own: int,
    measured: int,
    check: int,
    widest: int,
) -> CalibrationText:
    """Cut text for a calibration, each use spread evenly over every file.

    Args:
        source: Whose tokenizer it is for.
        paths: `.txt` or `.jsonl` files, each with the same share while it lasts; by default the
            documentation that Python carries.
        tokens: To fit on, at most.
        window: Tokens a window.
        own: So many windows to fit on come from elsewhere.
        measured: Windows to compare plans on, at most.
        check: Windows to check on, at most.
        widest: Layers in the widest group.

    Raises:
        TruedepthError: The text is too short for the width of the widest layer.
    """
    if window < 2 or tokens < 2 * window:
        raise TruedepthError(
            f"{tokens} calibration tokens are too few: two windows of {window} are the least, one"
            " to fit on and one to choose penalties on."
        )
    check_window(source, window)
    texts = [read_text(path) for path in paths] or [default_text()]
    parts = [token_windows(source.tokenizer, text, window) for text in texts]
    uses = [torch.arange(len(part)) % RESERVED for part in parts]
    wanted = [(measured, RESERVED // 2 - 1), (check, RESERVED - 1)]
    held = [
        mixed([part[use == rest] for part, use in zip(parts, uses, strict=True)], count)
        for count, rest in wanted
    ]
    left = [
        part[(use != RESERVED // 2 - 1) & (use != RESERVED - 1)]
        for part, use in zip(parts, uses, strict=True)
    ]
    fitted = mixed(left, tokens // window - own)
    needed, given = tokens_needed(source, widest), fitted.numel() + own * window
    if given < needed:
        raise TruedepthError(
            f"{given} calibration tokens are too few: the widest map has {needed} inputs"
            f" and needs at least as many tokens; give more text or more --tokens."
        )
    return CalibrationText(fitted, *held)


def tokens_needed(source: Source, widest: int) -> int:
    """As many as the widest map of a group of `widest` layers has inputs."""
    shapes = [
        source.tensors[source.family.layer.format(0) + f"{name}.weight"].shape
        for name in source.family.writes
    ]
    return widest * max(columns for _, columns in shapes)


def mixed(parts: Sequence[Tensor], count: int | None = None) -> Tensor:
    """`count` windows from all parts, or all of them, in an order that mixes them."""
    count = sum(map(len, parts)) if count is None else count
    shares = _shares([len(part) for part in parts], count)
    taken = torch.cat([_spread(part, share) for part, share in zip(parts, shares, strict=True)])
    return taken[torch.randperm(len(taken), generator=torch.Generator().manual_seed(0))]


def _shares(available: Sequence[int], wanted: int) -> list[int]:
    """Equal shares; what a short file lacks the others give."""
    shares = [0] * len(available)
    left = min(wanted, sum(available))
    shortest_first = sorted(range(len(available)), key=available.__getitem__)
    for done, index in enumerate(shortest_first):
        shares[index] = min(available[index], math.ceil(left / (len(available) - done)))
        left -= shares[index]
    return shares


def _spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spaced."""
    return windows[torch.arange(count) * len(windows) // max(1, count)]
