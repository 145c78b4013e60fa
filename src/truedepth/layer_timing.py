"""What one rank's share of a layer takes on this machine, by width, with random weights.

Stacks of layers are timed as `bench` times models, and their differences taken: a stack and half of
it, one of wide layers, one with all-reduces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from truedepth.engines.transformers import TransformersRunner, stopwatch
from truedepth.families import Family
from truedepth.loading import empty_model, transformers_config
from truedepth.modeling import PREFIX
from truedepth.padding import KEY_VALUE, QUERY, head_padding
from truedepth.timing import Case

ENOUGH = 1 << 28
REPETITIONS, WARMUPS = 7, 2


@dataclass(frozen=True)
class LayerTimes:
    """One rank's, in seconds."""

    layers: dict[int, float]
    """Of a layer by width, without its all-reduces."""

    weights: float
    """Of a layer of width 1, what reading its weights takes at the bandwidth of a large matrix."""

    rest: float
    """Embedding, last norm and head."""

    all_reduce: float
    """Of a token's hidden states; 0 for one rank."""

    bandwidth: float
    """Of a large matrix, in bytes a second."""


def shard(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """A config of one rank's share of every layer, heads padded where they do not divide.

    Raises:
        TruedepthError: The FFN's width does not divide by the ranks.
    """
    heads = config[QUERY]
    whole = {
        QUERY: heads,
        KEY_VALUE: config.get(KEY_VALUE) or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        **head_padding(config, ranks),
    }
    return dict(config) | {
        **whole,
        QUERY: whole[QUERY] // ranks,
        KEY_VALUE: whole[KEY_VALUE] // ranks,
        "intermediate_size": config["intermediate_size"] // ranks,
        "vocab_size": ceil(config["vocab_size"] / ranks),
        "pad_token_id": None,
        "num_hidden_layers": sum(config.get("layer_widths") or [1] * config["num_hidden_layers"]),
        "model_type": f"{PREFIX.lower()}_"
        + config["model_type"].removeprefix(f"{PREFIX.lower()}_"),
    }


def layer_times(
    config: Mapping[str, Any],
    family: Family,
    where: Path,
    widths: Sequence[int],
    case: Case,
    device: str,
    dtype: torch.dtype,
    enough: int = ENOUGH,
) -> LayerTimes:
    """Measure; in a process group all its ranks together, and all-reduces between them.

    Args:
        config: Of a share, from `shard`.
        family: Which maps are followed by an all-reduce.
        where: The model, for error messages.
        widths: To measure.
        case: A decoding.
        device: To run on.
        dtype: Of weights.
        enough: Bytes of weights to time at most: more than caches hold.
    """
    one = empty_model({**config, "num_hidden_layers": 1, "layer_widths": [1]}, where)
    size = dtype.itemsize * sum(p.numel() for p in one.base_model.layers.parameters())
    count = max(2 * max(widths), min(config["num_hidden_layers"], ceil(enough / size)))

    def stack(width: int, count: int) -> nn.Module:
        own = {**config, "num_hidden_layers": count, "layer_widths": [width] * count}
        model: nn.Module = AutoModelForCausalLM.from_config(
            transformers_config(own, where), dtype=dtype
        )
        return model.to(device).eval()

    stacks = {"half": stack(1, count // 2), "full": stack(1, count)}
    stacks |= {f"width {width}": stack(width, count // width) for width in widths if width > 1}
    if dist.is_initialized():
        stacks["reduced"] = reduced = stack(1, count)
        for name, module in reduced.named_modules():
            if family.split(name)[1] in family.writes:
                module.register_forward_hook(_all_reduce)
    runners = {name: TransformersRunner(model) for name, model in stacks.items()}
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for run in range(WARMUPS + REPETITIONS):
        for name, runner in runners.items():
            seconds = runner.seconds(case)
            if run >= WARMUPS:
                taken[name].append(seconds)

    def difference(more: str, less: str) -> float:
        """Of neighbouring runs."""
        return median(a - b for a, b in zip(taken[more], taken[less], strict=True))

    layer = difference("full", "half") / (count - count // 2)
    rest = max(0.0, median(taken["half"]) - layer * (count // 2))
    bandwidth = _bandwidth(enough, config["hidden_size"], case.batch, device, dtype)
    return LayerTimes(
        layers={1: layer}
        | {
            width: (median(taken[f"width {width}"]) - rest) / (count // width)
            for width in widths
            if width > 1
        },
        weights=size / bandwidth,
        rest=rest,
        all_reduce=max(0.0, difference("reduced", "full") / (2 * count))
        if "reduced" in taken
        else 0.0,
        bandwidth=bandwidth,
    )


def _all_reduce(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    dist.all_reduce(output)
    return output


def _bandwidth(size: int, hidden: int, batch: int, device: str, dtype: torch.dtype) -> float:
    """Bytes a second of a matrix that is multiplied with one vector a sequence."""
    matrix = torch.zeros(size // dtype.itemsize // hidden, hidden, device=device, dtype=dtype)
    vectors = torch.zeros(batch, hidden, device=device, dtype=dtype)
    times = [stopwatch(lambda: vectors @ matrix.T, device) for _ in range(WARMUPS + REPETITIONS)]
    return matrix.nbytes / median(times[WARMUPS:])
