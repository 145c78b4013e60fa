"""What `bench` prints, for a terminal of 80 columns."""

from __future__ import annotations

from math import floor, log10

from rich.filesize import decimal

from truedepth.benchmark import Benchmark
from truedepth.report.tables import print_rows
from truedepth.timing import Case, Collectives, Row, Timing


def print_benchmark(found: Benchmark) -> None:
    """Times, ratios, and what the ranks sent."""
    ranks = f", {found.ranks} tensor-parallel ranks" if found.ranks > 1 else ""
    runs = len(found.rows[0].model.seconds)
    print_rows(
        [
            ("model", found.model),
            *([("against", found.against)] if found.against else []),
            ("engine", f"{found.engine} {found.version} on {found.device}{ranks}"),
            ("runs", f"{runs} of each" + (", in turn" if found.against else "")),
        ]
    )
    print("\nMedian (range) in ms; of decode, a token's:\n")
    both = found.against is not None
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
    print("\nCollectives of one rank; of decode, a token's:\n")
    print_rows(
        [
            (*_case(row.case), name, *_collectives(timing.collectives))
            for row in sent
            for name, timing in (("against", row.base), ("model", row.model))
            if timing and timing.collectives
        ],
        header=("task", "tokens", "batch", "", "calls", "given to them", "share of time"),
        words=[3],
    )


def _case(case: Case) -> tuple[str, str, str]:
    return case.task.value, str(case.length), str(case.batch)


def _ms(timing: Timing) -> str:
    """With its range, three digits of each."""
    median, low, high = (
        f"{1000 * each:.{max(0, 2 - floor(log10(1000 * each)))}f}"
        for each in (timing.median, min(timing.seconds), max(timing.seconds))
    )
    return f"{median} ({low}-{high})"


def _range(row: Row) -> str:
    return f"{min(row.speedups):.2f}-{max(row.speedups):.2f}"


def _collectives(sent: Collectives) -> tuple[str, str, str]:
    return f"{sum(sent.calls.values()):,}", decimal(sent.bytes), f"{sent.share:.0%}"
