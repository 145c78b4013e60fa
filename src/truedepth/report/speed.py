"""What `bench` and `predict` print, for a terminal of 80 columns."""

from __future__ import annotations

from math import floor, log10

from rich.filesize import decimal

from truedepth.report.tables import console, print_rows
from truedepth.speed.benchmark import Benchmark
from truedepth.speed.prediction import Prediction
from truedepth.speed.timing import Case, Collectives, Row, Task, Timing
from truedepth.tensors import dtype_name


def print_benchmark(found: Benchmark) -> None:
    """Print times, speed-ups and the collectives of one rank."""
    setup = found.setup
    ranks = f", {setup.ranks} tensor-parallel ranks" if setup.ranks > 1 else ""
    dtype = f", {dtype_name(setup.dtype)}" if setup.dtype else ""
    eager = ", nothing compiled" if setup.eager else ""
    fused = ", stages fused" if setup.fuse else ""
    runs = len(found.rows[0].model.seconds)
    print_rows(
        [
            ("model", setup.model),
            *([("against", setup.against)] if setup.against else []),
            (
                "engine",
                f"{found.engine} {found.version} on {setup.device}{dtype}{ranks}{eager}{fused}",
            ),
            ("runs", f"{runs} of each" + (", in turn" if setup.against else "")),
        ]
    )
    print("\nMedian (range) in ms; for decode, per token:\n")
    both = setup.against is not None
    print_rows(
        [
            (
                *_case(row.case),
                *([_ms(row.base)] if row.base else []),
                _ms(row.model),
                *([f"{row.speedup:.2f} ({_range(row)})"] if row.base else []),
            )
            for row in found.rows
        ],
        header=(
            *("task", "tokens", "batch"),
            *(("against", "model", "speed-up") if both else ("model",)),
        ),
    )
    sent = [row for row in found.rows if row.model.collectives]
    if not sent:
        return
    print("\nCollectives of one rank; for decode, per token:\n")
    print_rows(
        [
            (*_case(row.case), name, *_collectives(timing.collectives))
            for row in sent
            for name, timing in (("against", row.base), ("model", row.model))
            if timing and timing.collectives
        ],
        header=("task", "tokens", "batch", "", "calls", "data", "share of time"),
        words=(0, 3),
    )


def print_prediction(found: Prediction) -> None:
    """Print what the time of a pass consists of, before and after, and whether the plan pays."""
    before, after, plan = found.before, found.after, found.plan
    one = found.ranks == 1
    link = "measured" if found.link is None else f"over {found.link.name} ({found.link.source})"
    prefill = found.task == Task.prefill
    tokens = f"{found.length:,} tokens"
    read = f"a large matrix is read at {found.measured.bandwidth / 1e9:.1f} GB/s"
    print_rows(
        [
            ("model", found.model),
            ("plan", str(plan)),
            ("effective depth", f"{plan.effective_depth} of {plan.num_layers}"),
            (
                "measured on",
                f"{found.device}, {found.dtype}, batch {found.batch},"
                f" {f'prompts of {tokens}' if prefill else f'{tokens} in the KV cache; {read}'}",
            ),
            *([] if one else [("ranks", f"{found.ranks}; all-reduces {link}")]),
            *([] if one else [("all-reduce", f"{found.message:,} bytes")]),
            *([("stages", "fused")] if found.fused else []),
            *([("heads", "padded with zeros to a multiple of the ranks")] if found.padded else []),
        ]
    )
    print(f"\nTime per {'pass over the prompts' if prefill else 'token'} in ms:\n")
    products = "products with layer weights" if prefill else "reading layer weights"
    parts = [
        (products, before.weights, after.weights),
        ("rest of the layers", before.layers, after.layers),
        ("all-reduces", before.all_reduces, after.all_reduces),
        ("embedding and head", before.rest, after.rest),
        ("total", before.total, after.total),
    ]
    print_rows(
        [
            (name, *(f"{1000 * each:.3f}" for each in times))
            for name, *times in parts
            if not (one and name == "all-reduces")
        ],
        header=("", "original", "planned"),
    )
    print(f"\nPredicted speed-up: {found.speedup:.2f}.")
    if not found.pays:
        most = max(parts[:-1], key=lambda part: part[1])
        console().print(
            f"The plan will not pay here: {most[1] / before.total:.0%} of the time is {most[0]},"
            " which it does not change."
            if most[0] in (products, "embedding and head")
            else "The plan will not pay here."
        )


def _case(case: Case) -> tuple[str, str, str]:
    return case.task.value, str(case.length), str(case.batch)


def _ms(timing: Timing) -> str:
    """The median and range of a timing in ms, with three digits each."""
    median, low, high = (
        f"{1000 * each:.{max(0, 2 - floor(log10(1000 * each)))}f}"
        for each in (timing.median, min(timing.seconds), max(timing.seconds))
    )
    return f"{median} ({low}-{high})"


def _range(row: Row) -> str:
    return f"{min(row.speedups):.2f}-{max(row.speedups):.2f}"


def _collectives(sent: Collectives) -> tuple[str, str, str]:
    return f"{sum(sent.calls.values()):,}", decimal(sent.bytes), f"{sent.share:.0%}"
