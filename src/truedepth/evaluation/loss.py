"""NLL, and the distance from the original, from logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_TOKENS = 128  # whose logits are held at a time, so that they stay in a processor's cache


def perplexity_of(nll: float) -> float:
    """exp(nll); infinite where that is beyond a float."""
    return math.exp(nll) if nll < 700 else math.inf


@dataclass(frozen=True)
class Loss:
    """Of a model against its original, on the same tokens."""

    tokens: int
    """Predicted."""

    excess: float
    """NLL above the original's, nats a token."""

    stderr: float | None
    """Of the excess, over windows; None for a single window."""

    kl: float
    """KL(original ‖ model), nats a token."""

    @classmethod
    def of(cls, rows: Tensor, window: int) -> Loss:
        """From the `[windows, 4]` of `window_measures`."""
        excess = rows[:, 0] - rows[:, 1]
        spread = (excess.std() / len(rows) ** 0.5).item() if len(rows) > 1 else None
        return cls(len(rows) * (window - 1), excess.mean().item(), spread, rows[:, 2].mean().item())


Predictions = Callable[[slice], Tensor]
"""Gives the logits `[positions, vocabulary]` of some positions of a window."""


def window_measures(
    targets: Tensor, models: Sequence[Predictions], original: Predictions | None = None
) -> Tensor:
    """Means over one window, of each model: NLL, and from the original its NLL, KL and agreement.

    Args:
        targets: `[positions]` int64, the tokens that were to be predicted.
        models: Their predictions; a few positions are asked for at a time.
        original: The predictions to compare them with.

    Returns:
        `[models, 4]` float64: NLL, original's NLL, KL(original ‖ model), in nats a token, and the
        share of equal top-1 tokens; the last three are 0 without an original.
    """
    sums = torch.zeros(len(models), 4, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        reference = None if original is None else original(chunk).float().log_softmax(-1)
        for row, model in zip(sums, models, strict=True):
            logp = model(chunk).float().log_softmax(-1)
            target = targets[chunk, None].to(logp.device)
            row[0] -= logp.gather(-1, target).double().sum().cpu()
            if reference is not None:
                row[1] -= reference.gather(-1, target).double().sum().cpu()
                row[2] += (reference.exp() * (reference - logp)).double().sum().cpu()
                row[3] += (reference.argmax(-1) == logp.argmax(-1)).sum().cpu()
    return sums / len(targets)
