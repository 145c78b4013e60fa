"""Windows whose end the student has written: text that it will meet when it generates.

Trained on such text, the student learns what the original would say where the student itself has
led, and not only where the original or other authors have (on-policy distillation, arXiv
2306.13649).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from truedepth.runtime.kv_cache import cache_argument


@torch.no_grad()
def rolled_out(
    student: PreTrainedModel, ids: Tensor, number: Tensor, tokens: int, share: float, seed: int
) -> Tensor:
    """Windows, some of them with their last tokens replaced by samples from the student.

    Which windows these are, and the random numbers that tokens are drawn by, depend on the seed and
    a window's index alone: any batches and any processes give the same.

    Args:
        student: The model that writes.
        ids: `[windows, length]` int64.
        number: `[windows]` int64, the index of each window.
        tokens: Number of tokens that are replaced; at least the first one stays.
        share: Share of the windows whose end is replaced.
        seed: Random seed.

    Returns:
        `[windows, length]` int64.
    """
    tokens = min(tokens, ids.shape[1] - 1)
    drawn = torch.stack([_uniform(seed, int(each), tokens + 1) for each in number.tolist()])
    chosen = (drawn[:, 0] < share).nonzero()[:, 0].to(ids.device)
    if not len(chosen):
        return ids
    written = _sampled(student, ids[chosen, :-tokens], drawn[:, 1:].to(ids.device)[chosen])
    found = ids.clone()
    found[chosen, -tokens:] = written
    return found


def _uniform(seed: int, number: int, count: int) -> Tensor:
    """Numbers from 0 to 1 that belong to a window."""
    generator = torch.Generator().manual_seed(((seed << 32) + number) % (1 << 63))
    return torch.rand(count, generator=generator)


def _sampled(student: PreTrainedModel, ids: Tensor, drawn: Tensor) -> Tensor:
    """`[windows, tokens]` samples behind `ids`, each by a number `drawn` from 0 to 1."""
    cache = cache_argument(student, DynamicCache(config=student.config))
    found = []
    with _in_evaluation(student):
        for each in drawn.unbind(1):
            logits = student(ids, **cache, use_cache=True, logits_to_keep=1).logits
            below = logits[:, -1].float().softmax(-1).cumsum(-1)
            ids = torch.searchsorted(below, each[:, None] * below[:, -1:], right=True)
            ids = ids.clamp(max=logits.shape[-1] - 1)
            found.append(ids)
    return torch.cat(found, 1)


@contextmanager
def _in_evaluation(student: PreTrainedModel) -> Iterator[None]:
    """Without gradient checkpointing, which allows no cache."""
    trained = student.training
    student.eval()
    try:
        yield
    finally:
        student.train(trained)
        torch.clear_autocast_cache()  # weights that were cast here have no gradient
