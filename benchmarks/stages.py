"""Speed of pairs, staggered and rank-local stages, as they are and fused, at equal all-reduces.

    python benchmarks/stages.py --json PATH [--model default] [--all-reduces 46,40] [--ranks 1,2]
        [--length 128] [--repetitions 15]

Timed is one token with a full cache, in transformers, nothing compiled: in one process, and
tensor-parallel over ranks of this machine. All models are loaded at once and take turns, and each
run is divided by the original's of the same turn. Weights are the original's: which sub-layers are
merged, and whether they are calibrated, does not affect speed. `fused` is `truedepth.fuse`, also of
the original, whose single sub-layers it joins. Rank-local stages are timed over several ranks only;
they are those of the staggered plan.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

import truedepth as td
from rows import machine, parser_of, report
from truedepth.plan.stages import FFN, LocalStage, Sublayer, staggered_stages
from truedepth.runtime.device import fast_dtype
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import Case, Task, in_turn
from truedepth.speed.transformers import TimedTransformersModel
from truedepth.tensors import dtype_name


def staggered(layers: int, number: int) -> td.Plan:
    """A plan of so many all-reduces that staggers the last layers.

    The fewest are those of `[A0] [F0 A1] … [Fn-2 An-1 Fn-1]`, one per layer.

    Raises:
        TruedepthError: No such plan has so many.
    """
    first, last = number - layers - 1, layers - 1
    stages = staggered_stages(max(first, 0), last)
    if first == -1:
        stages[-1] = (*stages[-1], Sublayer(last, FFN))
    plan = td.Plan(layers, stages=stages)
    if plan.all_reduces != number:
        raise td.TruedepthError(
            f"Staggered plans of {layers} layers have {layers} to {2 * layers} all-reduces, not"
            f" {number}."
        )
    return plan


def plans(layers: int, numbers: list[int]) -> dict[str, td.Plan]:
    """The plans to time, by name; spans as late as the rules of thumb put them."""
    found = {"original": td.Plan(layers)}
    for number in numbers:
        saved = 2 * layers - number
        found[f"pairs, {number}"] = td.Plan.late_pairs(layers, saved // 2)
        found[f"staggered, {number}"] = staggered(layers, number)
    return found


def local(plan: td.Plan, ranks: int) -> td.Plan:
    """The plan with all of its stages of several sub-layers local to so many ranks."""
    stages = [LocalStage(stage, ranks) for stage in plan.stages if len(stage) > 1]
    return td.Plan(plan.num_layers, stages=stages)


def loaded(paths: dict[str, Path], dtype: torch.dtype) -> dict[str, TimedTransformersModel]:
    """Every model as it is and fused, by name; sharded, if this process is one of several ranks."""
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype}
    if dist.is_initialized():
        ranks = DistributedConfig(tp_size=dist.get_world_size())
        options |= {"distributed_config": ranks, "device_map": None}
    models = {}
    for name, path in paths.items():
        models[name] = TimedTransformersModel(td.load(path, **options).model, False)
        fused = td.fuse(td.load(path, **options).model)
        models[f"{name}, fused"] = TimedTransformersModel(fused, False)
    return models


def timed(
    paths: dict[str, Path], case: Case, repetitions: int, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Seconds of every model in turn, and the all-reduces of one token; in one rank of several."""
    models = loaded(paths, dtype)
    taken = in_turn([partial(each.seconds, case) for each in models.values()], repetitions)
    found = {}
    for (name, model), seconds in zip(models.items(), taken, strict=True):
        speedups = [base / own for base, own in zip(taken[0], seconds, strict=True)]
        watched = model.collectives(case)
        found[name] = {
            "milliseconds": 1e3 * median(seconds),
            "speedup": median(speedups),
            "quartiles": quantiles(speedups)[::2],
            "all_reduces": watched.calls.get("all_reduce", 0) if watched else None,
        }
    return found


def main() -> None:
    """Convert, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--all-reduces", default="46,40")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    source = td.open_source(arguments.model)
    numbers, ranks = (
        list(map(int, text.split(","))) for text in (arguments.all_reduces, arguments.ranks)
    )
    case, dtype = Case(Task.decode, arguments.length, 1), fast_dtype(source, torch.device("cpu"))
    result: dict[str, Any] = {
        "machine": machine(),
        "model": source.name,
        "dtype": dtype_name(dtype),
        "length": arguments.length,
        "repetitions": arguments.repetitions,
    }
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for name, plan in plans(source.num_layers, numbers).items():
            paths[name] = Path(directory) / name
            td.convert(source, paths[name], plan, pad_heads=max(ranks))
        for count in ranks:
            run, own = timed, dict(paths)
            if count > 1:
                run = partial(run_ranks, count, timed)
                for number in numbers:
                    name = f"local, {number}"
                    own[name] = Path(directory) / f"{name}, {count}"
                    plan = local(staggered(source.num_layers, number), count)
                    td.convert(source, own[name], plan, pad_heads=max(ranks))
            result[f"{count} ranks"] = run(own, case, arguments.repetitions, dtype)
    report(result, arguments.json)


if __name__ == "__main__":
    main()
