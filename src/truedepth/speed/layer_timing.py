"""What a layer takes on this machine, by width, with random weights.

Stacks of layers are timed as `bench` times models, and their differences taken: a stack, half of
it, stacks of wide layers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from truedepth.families.family import KEY_VALUE, QUERY, head_dim
from truedepth.families.lookup import CONVERTED, original_family, unconverted
from truedepth.runtime.empty import empty_model, transformers_config
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import Case, in_turn
from truedepth.speed.transformers import TransformersRunner, stopwatch
from truedepth.widening.padding import head_padding

ENOUGH = 1 << 28
REPETITIONS = 7
PRODUCTS = 4  # at a time: a GPU begins one late


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
    """Of a token's hidden states, waiting for the other ranks included; 0 for one rank."""

    bandwidth: float
    """Of a large matrix, in bytes a second."""


Stack = tuple[int, int]
"""The width of its layers, and how many."""


def unpaired_config(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The config of the layers, all of width 1, with heads that divide by the ranks.

    Raises:
        TruedepthError: The FFN's width does not divide by the ranks.
    """
    heads = config[QUERY]
    return dict(config) | {
        KEY_VALUE: config.get(KEY_VALUE) or heads,
        "head_dim": head_dim(config),
        **head_padding(config, ranks),
        "pad_token_id": None,
        "num_hidden_layers": sum(config.get("layer_widths") or [1] * config["num_hidden_layers"]),
        "layer_widths": None,
        "side_by_side": None,
        **dict.fromkeys(original_family(config, "The model").per_layer),
        "model_type": CONVERTED + unconverted(config["model_type"]),
    }


def rank_config(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Of an `unpaired_config`, what one rank has."""
    return dict(config) | {
        name: ceil(config[name] / ranks)
        for name in (QUERY, KEY_VALUE, "intermediate_size", "vocab_size")
    }


def layer_times(
    config: Mapping[str, Any],
    where: Path,
    widths: Sequence[int],
    case: Case,
    device: str,
    dtype: torch.dtype,
    ranks: int = 1,
    enough: int = ENOUGH,
) -> LayerTimes:
    """Measure.

    Args:
        config: An `unpaired_config`; for one rank of several `rank_config` of it.
        where: The model, for error messages.
        widths: To measure.
        case: A decoding.
        device: To run on.
        dtype: Of weights.
        ranks: Over which transformers shards the layers.
        enough: Bytes of weights to time at most: more than caches hold.
    """
    one = empty_model({**config, "num_hidden_layers": 1, "layer_widths": [1]}, where)
    size = dtype.itemsize * sum(p.numel() for p in one.base_model.layers.parameters())
    count = max(2 * max(widths), min(config["num_hidden_layers"], ceil(enough / size)))
    full, half = (1, count), (1, count // 2)
    stacks = [full, half, *((width, count // width) for width in widths if width > 1)]
    measure = (case, device, size // ranks, min(enough, size * count) // ranks)

    def build(stack: Stack) -> Any:
        width, layers = stack
        own = {**config, "num_hidden_layers": layers, "layer_widths": [width] * layers}
        return AutoModelForCausalLM.from_config(transformers_config(own, where), dtype=dtype)

    if ranks == 1:
        models = {stack: build(stack).to(device).eval() for stack in stacks}
        return _measure(models, full, half, *measure)
    with tempfile.TemporaryDirectory() as directory:
        paths = {stack: Path(directory, "x".join(map(str, stack))) for stack in stacks}
        for stack, path in paths.items():
            build(stack).save_pretrained(path)
        found: LayerTimes = run_ranks(ranks, _measure_shares, paths, dtype, full, half, *measure)
        return found


def _measure_shares(paths: Mapping[Stack, Path], dtype: torch.dtype, *measure: Any) -> LayerTimes:
    """In one rank."""
    sharded = DistributedConfig(tp_size=dist.get_world_size())
    models = {
        stack: AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, distributed_config=sharded
        ).eval()
        for stack, path in paths.items()
    }
    return _measure(models, *measure)


def _measure(
    models: Mapping[Stack, nn.Module],
    full: Stack,
    half: Stack,
    case: Case,
    device: str,
    layer: int,
    matrix: int,
) -> LayerTimes:
    """Of these stacks; a layer of width 1 has so many bytes, and a large matrix should."""
    runners = {stack: TransformersRunner(model) for stack, model in models.items()}
    runs = [partial(runner.seconds, case) for runner in runners.values()]
    taken = dict(zip(runners, in_turn(runs, REPETITIONS), strict=True))
    layers, fewer = full[1], half[1]
    differences = [a - b for a, b in zip(taken[full], taken[half], strict=True)]
    rest = max(0.0, median(taken[half]) - fewer * median(differences) / (layers - fewer))
    sent = runners[full].collectives(case)
    all_reduce = sent.seconds / sum(sent.calls.values()) if sent else 0.0
    weights: Any = next(models[full].parameters())
    bandwidth = _bandwidth(matrix, weights.shape[-1], case.batch, device, weights.dtype)
    return LayerTimes(
        layers={
            stack[0]: (median(seconds) - rest) / stack[1] - 2 * all_reduce
            for stack, seconds in taken.items()
            if stack != half
        },
        weights=layer / bandwidth,
        rest=rest,
        all_reduce=all_reduce,
        bandwidth=bandwidth,
    )


def _bandwidth(size: int, hidden: int, batch: int, device: str, dtype: torch.dtype) -> float:
    """Bytes a second of a matrix that is multiplied with one vector a sequence."""
    matrix = torch.zeros(size // dtype.itemsize // hidden, hidden, device=device, dtype=dtype)
    vectors = torch.zeros(batch, hidden, device=device, dtype=dtype)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(vectors, matrix.T)

    (times,) = in_turn([lambda: stopwatch(products, device)], REPETITIONS)
    return PRODUCTS * matrix.nbytes / median(times)
