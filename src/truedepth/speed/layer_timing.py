"""Times layers of different widths on this machine, with random weights.

Stacks of layers are timed as `bench` times models: a full stack, one of half the height, stacks of
wide layers, and one in which every FFN shares a stage with the next attention. The time of one
layer, and what a shared stage adds to it, follow from their differences.
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
from truedepth.plan.plan import Plan
from truedepth.plan.stages import written
from truedepth.runtime.empty import empty_model, transformers_config
from truedepth.runtime.fusing import fuse
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import Case, Task, in_turn
from truedepth.speed.transformers import TimedTransformersModel, stopwatch
from truedepth.widening.padding import head_padding

ENOUGH = 1 << 28  # bytes of weights, more than caches hold
LONG = 1 << 35  # bytes of weights times rows of states that take long enough to be timed
REPETITIONS = 7
PRODUCTS = 4  # timed together, as a GPU starts the first one late


@dataclass(frozen=True)
class LayerTimes:
    """Times of one rank, for one pass of a case: prompts, or one token of every sequence."""

    layers: dict[int, float]
    """Seconds of one layer, without its all-reduces, by its width."""

    weights: float
    """Seconds to multiply the weights of a layer of width 1 at `bandwidth`."""

    rest: float
    """Seconds of embedding, last norm and head."""

    all_reduce: float
    """Seconds of one all-reduce, including waiting for other ranks; 0 for one rank."""

    bandwidth: float
    """Bytes per second of a large matrix in a product with the states of a pass."""

    shared: float = 0.0
    """Seconds that a sub-layer takes longer, or less below 0, if it runs in the stage of the one
    before it; without all-reduces."""


@dataclass(frozen=True)
class Stack:
    """Layers on top of each other."""

    width: int
    layers: int
    staggered: bool = False
    """Whether every FFN shares a stage with the next layer's attention."""

    @property
    def plan(self) -> Plan:
        """The plan of the original's layers that gives this stack."""
        count = self.width * self.layers
        if self.staggered:
            return Plan.staggered(count, 0, count - 1)
        return Plan.span(count, 0, count - 1, self.width)


def unpaired_config(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The config of the model without pairs: all layers of width 1, heads padded for the ranks.

    Args:
        config: Contents of config.json, of an original or a converted model.
        ranks: Tensor-parallel size; numbers of heads are made divisible by it.

    Raises:
        TruedepthError: The FFN width is not divisible by `ranks`.
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
        "stages": None,
        **dict.fromkeys(original_family(config, "The model").per_layer),
        "model_type": CONVERTED + unconverted(config["model_type"]),
    }


def rank_config(config: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """The config of one rank's share of the layers; `config` is an `unpaired_config`."""
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
    *,
    staggered: bool = False,
    fused: bool = False,
) -> LayerTimes:
    """Time stacks of layers, and compute the time of one layer of each width.

    Args:
        config: An `unpaired_config`; to time one rank's share alone, its `rank_config`.
        where: The model's path, for error messages.
        widths: Widths of layers to time.
        case: A case of the task `decode` or `prefill`.
        device: Device to run on.
        dtype: Dtype of the weights.
        ranks: Number of processes over which transformers shards the layers.
        enough: Most bytes of weights in a stack; more than caches hold.
        staggered: Whether to time stages that an FFN and the next attention share.
        fused: Whether to fuse all stages first.

    Raises:
        TruedepthError: Stages of the family cannot be fused.
    """
    one = empty_model({**config, "num_hidden_layers": 1, "layer_widths": [1]}, where)
    size = dtype.itemsize * sum(p.numel() for p in one.base_model.layers.parameters())
    if case.task is Task.prefill:
        enough = min(enough, ceil(LONG * ranks / case.rows))
    count = max(2 * max(widths), min(config["num_hidden_layers"], ceil(enough / size)))
    full, half = Stack(1, count), Stack(1, count // 2)
    stacks = [full, half, *(Stack(width, count // width) for width in widths if width > 1)]
    stacks += [Stack(1, count, staggered=True)] if staggered else []
    measure = (fused, case, device, size // ranks, min(enough, size * count) // ranks)

    def build(stack: Stack) -> Any:
        own = {**config, **planned(config, where, stack.plan)}
        return AutoModelForCausalLM.from_config(transformers_config(own, where), dtype=dtype)

    if ranks == 1:
        models = {stack: build(stack).to(device).eval() for stack in stacks}
        return _measure(models, full, half, *measure)
    with tempfile.TemporaryDirectory() as directory:
        paths = {stack: Path(directory, str(number)) for number, stack in enumerate(stacks)}
        for stack, path in paths.items():
            build(stack).save_pretrained(path)
        found: LayerTimes = run_ranks(ranks, _measure_shares, paths, dtype, full, half, *measure)
        return found


def planned(config: Mapping[str, Any], where: Path, plan: Plan) -> dict[str, Any]:
    """What config.json says of layers under a plan of groups or one of stages.

    Args:
        config: An `unpaired_config` or `rank_config`.
        where: The model's path, for error messages.
        plan: Groups of layers or stages of sub-layers, not both.
    """
    entries: dict[str, Any] = {
        "num_hidden_layers": len(plan.widths),
        "layer_widths": plan.widths,
    }
    if plan.merged:
        family = original_family(config, str(where))
        form = family.layer_form(transformers_config(config, where))
        entries["stages"] = [written(stage) for stage in plan.merged]
        entries["sublayers"] = form | {"writes": family.parts_of_sums}
    return entries


def _measure_shares(paths: Mapping[Stack, Path], dtype: torch.dtype, *measure: Any) -> LayerTimes:
    """Time the stacks in `paths`, sharded; every rank runs this."""
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
    fused: bool,
    case: Case,
    device: str,
    layer: int,
    matrix: int,
) -> LayerTimes:
    """Time these stacks.

    `layer` is the bytes of weights of a layer of width 1, `matrix` those of the large matrix.
    """
    if fused:
        for model in models.values():
            fuse(model)
    timed = {stack: TimedTransformersModel(model) for stack, model in models.items()}
    runs = [partial(model.seconds, case) for model in timed.values()]
    taken = dict(zip(timed, in_turn(runs, REPETITIONS), strict=True))

    def longer(stack: Stack, other: Stack) -> float:
        return median(a - b for a, b in zip(taken[stack], taken[other], strict=True))

    each = longer(full, half) / (full.layers - half.layers)
    rest = max(0.0, median(taken[half]) - half.layers * each)
    sent = timed[full].collectives(case)
    all_reduce = sent.seconds / sum(sent.calls.values()) if sent and sent.calls else 0.0
    weights: Any = next(models[full].parameters())
    bandwidth = _bandwidth(matrix, weights.shape[-1], case.rows, device, weights.dtype)
    return LayerTimes(
        layers={
            stack.width: (median(seconds) - rest) / stack.layers - 2 * all_reduce
            for stack, seconds in taken.items()
            if stack != half and not stack.staggered
        },
        weights=layer / bandwidth,
        rest=rest,
        all_reduce=all_reduce,
        bandwidth=bandwidth,
        shared=sum(
            longer(stack, full) / (stack.layers - 1) + all_reduce
            for stack in taken
            if stack.staggered
        ),
    )


def _bandwidth(size: int, hidden: int, rows: int, device: str, dtype: torch.dtype) -> float:
    """Bytes per second of a matrix of `size` bytes, multiplied by `rows` vectors."""
    matrix = torch.zeros(size // dtype.itemsize // hidden, hidden, device=device, dtype=dtype)
    vectors = torch.zeros(rows, hidden, device=device, dtype=dtype)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.mm(vectors, matrix.T)

    (times,) = in_turn([lambda: stopwatch(products, device)], REPETITIONS)
    return PRODUCTS * matrix.nbytes / median(times)
