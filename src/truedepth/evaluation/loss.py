"""NLL, and the distance from the original, from logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from truedepth.checkpoint.records import Loss

CHUNK_TOKENS = 128  # positions whose logits are held at a time: they stay in a processor's cache


def perplexity_of(nll: float) -> float:
    """exp(nll); infinite if that is beyond a float."""
    return math.exp(nll) if nll < 700 else math.inf


def loss_of(rows: Tensor, window: int) -> Loss:
    """A model's loss, from its `window_measures` `[windows, 4]`; `window` is tokens per window."""
    excess = rows[:, 0] - rows[:, 1]
    spread = (excess.std() / len(rows) ** 0.5).item() if len(rows) > 1 else None
    return Loss(len(rows) * (window - 1), excess.mean().item(), spread, rows[:, 2].mean().item())


Predictions = Callable[[slice], Tensor]
"""Gives the logits `[positions, vocabulary]` of some positions of a window."""


class FromOriginal(NamedTuple):
    """What an original says at some positions; each `[positions]`."""

    nll: Tensor
    """NLL of the tokens that followed, nats."""

    kl: Tensor
    """KL(original ‖ model), nats."""

    top1: Tensor
    """Its most likely tokens."""


def measures(logp: Tensor, targets: Tensor, original: FromOriginal | None = None) -> Tensor:
    """How well the tokens at some positions are predicted.

    Args:
        logp: `[positions, vocabulary]` float32, the model's log probabilities.
        targets: `[positions]` int64, the tokens that were to be predicted.
        original: What the original says at these positions, to compare with.

    Returns:
        `[positions, 4]` float64: NLL, the original's NLL and KL(original ‖ model) in nats, and 1
        where the most likely tokens are equal, else 0; the last three are 0 without an original.
    """
    nll = -logp.gather(-1, targets[:, None].to(logp.device)).squeeze(-1)
    columns = [nll, *[torch.zeros_like(nll)] * 3]
    if original is not None:
        columns[1:] = [original.nll, original.kl, original.top1 == logp.argmax(-1)]
    return torch.stack([column.double() for column in columns], -1)


def window_measures(
    targets: Tensor, models: Sequence[Predictions], original: Predictions | None = None
) -> Tensor:
    """The means of `measures` over one window, of each model.

    Args:
        targets: `[positions]` int64, the tokens that were to be predicted.
        models: Their predictions; a few positions are asked for at a time.
        original: The predictions to compare them with.

    Returns:
        `[models, 4]` float64, on the CPU.
    """
    sums = torch.zeros(len(models), 4, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        theirs = None if original is None else original(chunk).float().log_softmax(-1)
        for row, model in zip(sums, models, strict=True):
            logp = model(chunk).float().log_softmax(-1)
            compared = None if theirs is None else _compared(theirs, logp, targets[chunk])
            row += measures(logp, targets[chunk], compared).sum(0).cpu()
    return sums / len(targets)


def _compared(theirs: Tensor, logp: Tensor, targets: Tensor) -> FromOriginal:
    nll = -theirs.gather(-1, targets[:, None].to(theirs.device)).squeeze(-1)
    kl = (theirs.exp() * (theirs - logp)).double().sum(-1)
    return FromOriginal(nll, kl, theirs.argmax(-1))
