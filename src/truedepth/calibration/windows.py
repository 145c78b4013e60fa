"""The text of a calibration, cut into windows to fit maps to, to measure and to check on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truedepth.calibration.options import Calibration
from truedepth.errors import TruedepthError
from truedepth.plan.stages import Segment, Sublayer
from truedepth.runtime.device import device_of, fast_dtype
from truedepth.runtime.generation import own_text
from truedepth.runtime.loading import load
from truedepth.sources.source import Source
from truedepth.text import default_text, read_text, token_windows, window_of

RESERVED_EVERY = 8  # of every 8 windows of a text one is for measuring and one for checks
MEASURE, CHECK = 3, 7  # which of them


@dataclass(frozen=True)
class CalibrationText:
    """Token windows for three separate uses, each `[windows, window]` int64.

    The places in a text that one use takes its windows from do not depend on the other uses, so a
    search and a calibration on the same text agree.
    """

    fitted: Tensor
    """Windows that maps are fitted to."""

    measured: Tensor
    """Windows that plans are compared on."""

    check: Tensor
    """Windows that nothing is fitted to or chosen by."""

    @property
    def window(self) -> int:
        """Tokens per window."""
        return self.fitted.shape[1]


def placement(source: Source, options: Calibration) -> tuple[torch.device, torch.dtype]:
    """The device and the dtype that the layers of a calibration compute in.

    Raises:
        TruedepthError: This machine has no such device.
    """
    device = device_of(options.device)
    return device, options.dtype or fast_dtype(source, device)


def activation_dtype(options: Calibration) -> torch.dtype:
    """The dtype that the hidden states of a calibration are kept in."""
    return options.activation_dtype or torch.float32


def calibration_windows(
    source: Source, options: Calibration, segments: Iterable[Segment], measured: int = 0
) -> CalibrationText:
    """The text of a calibration, the model's own share of it included.

    Args:
        source: The original.
        options: Text, tokens and share.
        segments: What may be refitted.
        measured: Largest number of windows to compare plans on.

    Raises:
        TruedepthError: Options do not fit the model, or the text is too short for the widest map.
    """
    text, own = given_text(source, options, segments, measured)
    if not own:
        return text
    device, dtype = placement(source, options)
    loaded = load(source, device=device, dtype=dtype)
    written = own_text(loaded, own, text.window, options.seed)
    return replace(text, fitted=_mixed([text.fitted, written], options.seed))


def given_text(
    source: Source, options: Calibration, segments: Iterable[Segment], measured: int = 0
) -> tuple[CalibrationText, int]:
    """`calibration_windows` without the model's own share, and how many windows that is.

    Each use is spread evenly over every file. This takes seconds, and the model's own text minutes:
    call this alone to find out before a search whether text and options fit.
    """
    window = window_of(source, options.window)
    options = replace(options, window=window)  # which looks at the number of tokens
    own = round(options.own_share * (options.tokens // window))
    texts = [read_text(path) for path in options.text] or [default_text()]
    parts = [token_windows(source, text, window) for text in texts]
    uses = [torch.arange(len(part)) % RESERVED_EVERY for part in parts]
    wanted = [(measured, MEASURE), (options.check, CHECK)]
    held = [
        _mixed([part[use == rest] for part, use in zip(parts, uses, strict=True)], 0, count)
        for count, rest in wanted
    ]
    left = [part[(use != MEASURE) & (use != CHECK)] for part, use in zip(parts, uses, strict=True)]
    fitted = _mixed(left, options.seed, options.tokens // window - own)
    needed, given = tokens_needed(source, segments), fitted.numel() + own * window
    if given < needed:
        raise TruedepthError(
            f"{given} calibration tokens are too few: the widest map has {needed} inputs"
            f" and needs at least as many tokens; give more text or more --tokens."
        )
    return CalibrationText(fitted, *held), own


def tokens_needed(source: Source, segments: Iterable[Segment]) -> int:
    """The number of inputs of the widest map that is solved for in segments."""

    def columns(sublayer: Sublayer) -> int:
        family, layer = source.family, source.family.layer.format(sublayer.layer)
        own = (name for name in family.writes if family.part_of(sublayer.kind, name))
        found = (source.tensors.get(f"{layer}{name}.weight") for name in own)
        return sum(tensor.shape[1] for tensor in found if tensor is not None)

    stages = (stage for segment in segments for stage in segment)
    return max((sum(map(columns, stage)) for stage in stages), default=0)


def _mixed(parts: Sequence[Tensor], seed: int, count: int | None = None) -> Tensor:
    """`count` windows from all parts, or all of them, in an order that mixes them."""
    count = sum(map(len, parts)) if count is None else count
    shares = _shares([len(part) for part in parts], count)
    taken = torch.cat([_spread(part, share) for part, share in zip(parts, shares, strict=True)])
    return taken[torch.randperm(len(taken), generator=torch.Generator().manual_seed(seed))]


def _shares(available: Sequence[int], wanted: int) -> list[int]:
    """Equal shares; what a short file lacks, the others give."""
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
