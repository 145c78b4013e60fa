"""Stages over real slow links: two ranks in two network namespaces, joined by a shaped link.

    python benchmarks/shaped_link.py --json PATH [--model default] [--links 1gbit,10gbit,500us]
        [--all-reduces 46,40,30] [--cases decode:128,prefill:128,prefill:1024,prefill:4096]
        [--repetitions 5]

Ranks of transformers' tensor parallelism over gloo, one thread each. The link has the rate of a
token bucket and the delay of netem or of a relay (`shaped_links.py`); a delay holds every packet,
in each direction. The original and staggered plans, as they are and fused, are loaded at once and
take turns. Ratios are of medians, with the range of neighbouring runs, against the original that is
fused likewise; collectives are counted and must be those of the plan. Beside each ratio stands the
predicted one: `truedepth predict`'s, with a link whose latency and bandwidth are those of two
all-reduces that were timed over it, behind some products. Both ranks time their share of the layers
at once, as they share this machine's memory. Needs root; without namespaces it says so and measures
nothing.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

import truedepth as td
from rows import Rows, machine, parser_of
from shaped_links import ADDRESSES, NotAllowedError, Shape, enter, shaped
from stages import loaded, staggered
from truedepth.runtime.device import fast_dtype
from truedepth.sources.source import Source
from truedepth.speed.layer_timing import LayerTimes, layer_times, rank_config, unpaired_config
from truedepth.speed.links import Link
from truedepth.speed.prediction import costs_of, message_bytes
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import Case, Task, Timing, in_turn
from truedepth.tensors import dtype_name

RANKS = 2
PORT = 17023
PINGS, BULK = 1000, 64 << 20
"""Round trips that are timed, and bytes sent to find the rate."""

PRODUCT = (1536, 1152)
"""The shape of a matrix; four products with it take about as long as a sub-layer's token."""

SMALL, LARGE = 1 << 10, 4 << 20
"""Bytes of the all-reduces that give a link's latency and bandwidth."""


def plans(layers: int, numbers: list[int]) -> dict[str, td.Plan]:
    """The original, and staggered plans of so many all-reduces."""
    return {"original": td.Plan(layers)} | {str(each): staggered(layers, each) for each in numbers}


def cases_of(text: str) -> list[Case]:
    """Read `decode:128,prefill:1024`.

    Raises:
        TruedepthError: The text is something else.
    """
    found = []
    for word in text.split(","):
        task, _, length = word.partition(":")
        if task not in (Task.decode, Task.prefill) or not length.isdecimal():
            raise td.TruedepthError(f"A case is such as decode:128 or prefill:1024, not {word!r}.")
        found.append(Case(Task(task), int(length)))
    return found


def expected(
    plan: td.Plan, config: Mapping[str, Any], case: Case, dtype: torch.dtype
) -> tuple[dict[str, int], int]:
    """Calls and bytes of one rank's collectives in one pass, as a plan implies them.

    One all-reduce a stage, one for the embedding, and an all-gather of the last token's logits.
    """
    calls = {"all_reduce": plan.all_reduces + 1, "all_gather": 1}
    logits = case.batch * config["vocab_size"] // RANKS * dtype.itemsize
    return calls, calls["all_reduce"] * message_bytes(config, case, dtype) + logits


def measure(
    paths: dict[str, Path],
    config: dict[str, Any],
    cases: list[Case],
    repetitions: int,
    dtype: torch.dtype,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time the link, and in every case every model in turn and its parts; in one of two ranks.

    `config` is the `rank_config` of the original.
    """
    link = wire()
    models = loaded(paths, dtype)
    found = []
    for case in cases:
        runs = [partial(each.seconds, case) for each in models.values()]
        taken = in_turn(runs, repetitions, warmups=1)
        timings = (
            asdict(Timing(seconds, model.collectives(case)))
            for seconds, model in zip(taken, models.values(), strict=True)
        )
        layers = partial(layer_times, config, Path("share"), [1], case, "cpu", dtype)
        found.append(
            {
                "models": dict(zip(models, timings, strict=True)),
                "all_reduce": {size: all_reduce(size, dtype) for size in (SMALL, LARGE)},
                "layers": {
                    name: asdict(layers(staggered=True, fused=fused))
                    for name, fused in (("as they are", False), ("fused", True))
                },
            }
        )
    return link, found


def wire() -> dict[str, Any]:
    """Round trips of one byte in seconds, and bits per second of one stream, over a socket."""
    first = dist.get_rank() == 0
    if first:
        with socket.create_server((ADDRESSES[0], PORT)) as server:
            dist.barrier()
            other, _ = server.accept()
    else:
        dist.barrier()
        other = socket.create_connection((ADDRESSES[0], PORT))
    with other:
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(PINGS):
            start = time.perf_counter()
            if first:
                other.sendall(b"?")
            other.recv(1)
            if not first:
                other.sendall(b"!")
            trips.append(time.perf_counter() - start)
        congestion = other.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        start, block = time.perf_counter(), bytearray(1 << 20)
        if first:
            for _ in range(BULK // len(block)):
                other.sendall(block)
            other.recv(1)
        else:
            left = BULK
            while left:
                left -= other.recv_into(block)
            other.sendall(b"!")
        taken = time.perf_counter() - start
    parts = quantiles(trips, n=100)
    return {
        "round_trip": {"median": median(trips), "1%": parts[0], "99%": parts[-1]},
        "bits_per_second": 8 * BULK / taken,
        "congestion": congestion.rstrip(b"\0").decode(),
    }


def all_reduce(size: int, dtype: torch.dtype) -> float:
    """Seconds of an all-reduce of `size` bytes behind products, as in a model.

    Ranks that have just computed take longer than ranks that do nothing else: nearly twice as long,
    where the link is fast.
    """
    tensor = torch.zeros(size // dtype.itemsize, dtype=dtype)
    weights, state = torch.zeros(PRODUCT, dtype=dtype), torch.zeros(1, PRODUCT[1], dtype=dtype)
    taken = []
    for _ in range(40):
        for _ in range(4):
            torch.mm(state, weights.T)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        taken.append(time.perf_counter() - start)
    return median(taken[4:])


def as_link(text: str, bare: Mapping[int, float]) -> Link:
    """A link of the latency and bandwidth that two all-reduces had."""
    bandwidth = (LARGE - SMALL) / (bare[LARGE] - bare[SMALL])
    latency = bare[SMALL] - SMALL / bandwidth
    return Link(text, latency, 0.0, bandwidth, "measured")


def results(
    rows: Mapping[str, Any], shapes: list[Shape], cases: list[Case], source: Source
) -> dict[str, dict[str, Any]]:
    """Ratios of every model in every case over every link, measured and predicted.

    Raises:
        TruedepthError: A model's collectives are not those of its plan.
    """
    dtype = getattr(torch, rows["setup"]["dtype"])
    found = {}
    for shape, case in itertools.product(shapes, cases):
        row = rows[f"{shape.text}, {said(case)}"]
        link = as_link(shape.text, {int(size): each for size, each in row["all_reduce"].items()})
        models = {}
        for name, timing in row["models"].items():
            plain, _, fused = name.partition(", ")
            plan = td.Plan.from_dict(rows["setup"]["plans"][plain])
            sent, own = timing["collectives"], expected(plan, source.config, case, dtype)
            if (sent["calls"], sent["bytes"]) != own:
                raise td.TruedepthError(
                    f"{name}, {said(case)}: {sent['calls']} of {sent['bytes']} bytes were sent; the"
                    f" plan says {own[0]} of {own[1]}."
                )
            layers = row["layers"]["fused" if fused else "as they are"]
            layers = layers | {"layers": {1: layers["layers"]["1"]}}
            costs = costs_of(LayerTimes(**layers), link, source.config, case, dtype, RANKS)
            models[name] = {
                "all_reduces": plan.all_reduces,
                "seconds": median(timing["seconds"]),
                "predicted": costs.of(plan).total,
                "calls": sum(sent["calls"].values()),
                "bytes": sent["bytes"],
                "share": sent["share"],
            }
            base = f"original, {fused}" if fused else "original"
            against = row["models"][base]["seconds"]
            ratios = [a / b for a, b in zip(against, timing["seconds"], strict=True)]
            models[name] |= {
                "speedup": models[base]["seconds"] / models[name]["seconds"],
                "range": [min(ratios), max(ratios)],
                "predicted_speedup": models[base]["predicted"] / models[name]["predicted"],
            }
        found[f"{shape.text}, {said(case)}"] = models
    return found


def said(case: Case) -> str:
    """`decode:128`."""
    return f"{case.task}:{case.length}"


def main() -> None:
    """Convert, measure link after link, predict, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--links", default="1gbit,10gbit,500us")
    parser.add_argument("--all-reduces", default="46,40,30")
    parser.add_argument("--cases", default="decode:128,prefill:128,prefill:1024,prefill:4096")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(1)
    try:
        run(arguments)
    except NotAllowedError as error:
        print(f"Skipped: {error}")
    except td.TruedepthError as error:
        parser.error(str(error))


def run(arguments: Any) -> None:
    """Measure and predict what the options say; what the file has is not measured again."""
    shapes = [Shape.parse(text) for text in arguments.links.split(",")]
    cases = cases_of(arguments.cases)
    source = td.open_source(arguments.model)
    dtype = fast_dtype(source, torch.device("cpu"))
    found = plans(source.num_layers, [int(word) for word in arguments.all_reduces.split(",")])
    with shaped(shapes[0]):  # to know at once whether there can be namespaces
        pass
    config = rank_config(unpaired_config(source.config, RANKS), RANKS)
    rows = Rows(arguments.json)
    rows["setup"] = {
        "machine": machine(),
        "model": source.name,
        "dtype": dtype_name(dtype),
        "ranks": RANKS,
        "plans": {name: plan.to_dict() for name, plan in found.items()},
    }
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: Path(directory, name) for name in found}
        for name, plan in found.items():
            td.convert(source, paths[name], plan, pad_heads=RANKS)
        for shape in shapes:
            missing = [case for case in cases if f"{shape.text}, {said(case)}" not in rows]
            if missing:
                with shaped(shape) as namespaces:
                    measured = partial(run_ranks, RANKS, measure, first=partial(enter, namespaces))
                    link, timings = measured(paths, config, missing, arguments.repetitions, dtype)
                for case, timing in zip(missing, timings, strict=True):
                    rows[f"{shape.text}, {said(case)}"] = timing
                rows[shape.text] = link
                rows.show(shape.text)
    rows["results"] = results(json.loads(json.dumps(rows)), shapes, cases, source)
    for title, models in rows["results"].items():
        show(title, models)


def show(title: str, models: Mapping[str, Any]) -> None:
    """Print the rows of a case over a link."""
    print(title)
    for name, each in models.items():
        low, high = each["range"]
        print(
            f"  {name:15} {each['seconds'] * 1e3:8.1f} ms, predicted {each['predicted'] * 1e3:.1f};"
            f" {each['speedup']:.2f} ({low:.2f}-{high:.2f}), predicted"
            f" {each['predicted_speedup']:.2f}; {each['calls']} collectives, {each['bytes']:,}"
            f" bytes, {each['share']:.0%} of the time"
        )


if __name__ == "__main__":
    main()
