"""Speed, always as an interleaved comparison: these are ratios first and tokens a second after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from truedepth.loading import Loaded


@dataclass(frozen=True)
class DecodeSpeed:
    """Tokens a second of one model over several runs, batch 1, dynamic KV cache."""

    median: float
    lowest: float
    highest: float


@torch.inference_mode()
def decode_speed(
    models: Sequence[Loaded], *, prompt_tokens: int = 32, new_tokens: int = 32, runs: int = 5
) -> list[DecodeSpeed]:
    """Greedy decoding of several models in turn (A B A B …), so that noise falls on all alike.

    Args:
        models: What to measure.
        prompt_tokens: Length of the prompt, which is not timed.
        new_tokens: Tokens decoded one by one in a run.
        runs: Timed runs of each model; one more before them is not counted.
    """
    seconds: list[list[float]] = [[] for _ in models]
    for run in range(runs + 1):
        for loaded, taken in zip(models, seconds, strict=True):
            elapsed = _decode(loaded, prompt_tokens, new_tokens)
            if run:
                taken.append(elapsed)
    return [
        DecodeSpeed(
            median=new_tokens / statistics.median(taken),
            lowest=new_tokens / max(taken),
            highest=new_tokens / min(taken),
        )
        for taken in seconds
    ]


def _decode(loaded: Loaded, prompt_tokens: int, new_tokens: int) -> float:
    """Seconds that `new_tokens` decoding steps take after a prompt."""
    model = loaded.model
    ids = torch.arange(prompt_tokens, device=model.device)[None] % model.config.vocab_size
    output = model(ids, use_cache=True)
    _synchronize(model.device)
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    _synchronize(model.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
