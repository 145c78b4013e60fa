"""Layer parallelism over slower links: the speed-up against the delay of each collective.

    python benchmarks/slow_link.py MODEL --against BASE --json PATH [--plot PICTURE] [--ranks 2]
        [--length 128] [--delays 0,50,100,500,1000] [--repetitions 7]

Ranks of transformers' tensor parallelism on this machine, over gloo on a CPU. Every collective is
made longer by a delay, as over a slower link (GPUs without NVLink, several hosts). Nothing is
compiled, because the delay does not reach compiled graphs. Timed is one token with a full cache,
the model and its base in turn. Next to each ratio stands the predicted one: `truedepth predict`'s
times with the delay added to each collective that was counted.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

import truedepth as td
from rows import parser_of
from truedepth.runtime.device import default_device, fast_dtype
from truedepth.speed.collectives import watched
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import Case, Collectives, Row, Task, interleaved
from truedepth.speed.transformers import TimedTransformersModel


class SlowModel(TimedTransformersModel):
    """Over a wire that takes longer."""

    delay = 0.0

    def seconds(self, case: Case) -> float:
        """Seconds of one run; for decoding, seconds per token."""
        with watched(self.delay):
            return super().seconds(case)


def measure(
    model: str, base: str, case: Case, delays: list[float], repetitions: int, dtype: torch.dtype
) -> list[Row]:
    """Time both models at every delay, in one rank."""
    sharded = {
        "distributed_config": DistributedConfig(tp_size=dist.get_world_size()),
        "device_map": None,
        "dtype": dtype,
    }
    ours, theirs = (SlowModel(td.load(name, **sharded).model, False) for name in (model, base))
    rows = []
    for delay in delays:
        ours.delay = theirs.delay = delay
        rows += interleaved(ours, theirs, [case], repetitions, warmups=2)
    return rows


def main() -> None:
    """Measure, predict, print."""
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--against", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--delays", default="0,50,100,500,1000", help="microseconds")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    delays = [float(word) * 1e-6 for word in arguments.delays.split(",")]
    source = td.open_source(arguments.model)
    dtype = fast_dtype(source, torch.device(default_device()))
    case = Case(Task.decode, arguments.length, arguments.batch)
    found = td.predict(
        source, ranks=arguments.ranks, batch=case.batch, length=case.length, dtype=dtype
    )
    measured = run_ranks(
        arguments.ranks,
        measure,
        arguments.model,
        arguments.against,
        case,
        delays,
        arguments.repetitions,
        dtype,
    )
    rows: list[dict[str, Any]] = []
    for delay, row in zip(delays, measured, strict=True):
        before = found.before.total + delay * calls(row.base.collectives)
        after = found.after.total + delay * calls(row.model.collectives)
        rows.append({"delay": delay, "predicted": before / after, **row.to_dict()})
        low, high = min(row.speedups), max(row.speedups)
        print(
            f"{delay * 1e6:6.0f} µs: {row.base.median * 1e3:7.1f} ms -> "
            f"{row.model.median * 1e3:7.1f} ms, {row.speedup:.2f} ({low:.2f}-{high:.2f}),"
            f" predicted {before / after:.2f}"
        )
    data = {"prediction": found.to_dict(), "case": asdict(case), "rows": rows}
    arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


def calls(sent: Collectives | None) -> int:
    """Number of collectives per token."""
    return sum(sent.calls.values()) if sent else 0


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up against delay, measured and predicted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    delays = [1e6 * row["delay"] for row in rows]
    middle = [row["speedup"] for row in rows]
    spread = list(zip(*(row["spread"] for row in rows), strict=True))
    axes.errorbar(delays, middle, spread, fmt="o-", capsize=3, label="measured")
    axes.plot(delays, [row["predicted"] for row in rows], "x--", label="predicted")
    axes.set(xlabel="added to every collective, µs", ylabel="speed-up per token")
    axes.set_xscale("symlog", linthresh=50)
    axes.set_xticks(delays, [f"{delay:g}" for delay in delays])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
