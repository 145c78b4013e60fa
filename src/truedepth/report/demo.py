"""What `demo` prints, for a terminal of 80 columns."""

from __future__ import annotations

from rich.columns import Columns
from rich.filesize import decimal
from rich.panel import Panel

from truedepth.demo import Demo
from truedepth.report.conversion import calibration_rows
from truedepth.report.evaluation import excess_text
from truedepth.report.tables import console, plan_rows, print_rows
from truedepth.speed.timing import Timing


def print_demo(demo: Demo) -> None:
    """Print one page: plan, size, loss, speed, and both models' answers to one prompt."""
    measured, done, plan = demo.perplexity, demo.conversion, demo.conversion.plan
    print_rows(
        [
            ("model", f"{done.source} ({done.origin})"),
            *plan_rows(plan, done.executed_plan),
            *calibration_rows(done),
            ("weights", decimal(done.size) + (f", kept in {done.path}" if demo.kept else "")),
        ]
    )
    print()
    assert demo.speed.base is not None
    written = demo.generation
    loops = [each for each in (written.original, written.written) if each is not None]
    counted = [
        str(each.collectives.calls.get("all_reduce")) if each.collectives else "-"
        for each in (demo.speed.base, demo.speed.model)
    ]
    print_rows(
        [
            (
                "all-reduces per token, in the layers",
                str(plan.unpaired.all_reduces),
                str(done.executed_plan.all_reduces),
            ),
            *([("… counted, with the embedding's", *counted)] if demo.ranks > 1 else []),
            ("perplexity", f"{measured.against_perplexity:.2f}", f"{measured.perplexity:.2f}"),
            ("excess loss, nats per token", "", excess_text(measured)),
            ("KL from the original, nats per token", "", f"{measured.kl:.4f}"),
            ("top-1 agreement", "", f"{measured.top1_agreement:.1%}"),
            (
                "greedy tokens as the original's, in its answers",
                f"{written.itself:.1%}",
                f"{written.agreement:.1%}",
            ),
            ("answers that end in a loop", *(f"{each.loops:.1%}" for each in loops)),
            (f"tokens/s, {_where(demo)}", _rate(demo.speed.base), _rate(demo.speed.model)),
            ("speed-up", "", f"{demo.speed.speedup:.2f}x"),
        ],
        header=("", "original", "fewer steps"),
    )
    print(f"\nPerplexity on {measured.tokens:,} tokens of {measured.text}.")
    print(f"Answers to {written.answers} prompts, of at most {written.max_new_tokens} tokens.")
    print("Both models are timed with fused stages (truedepth.fuse).")
    if demo.ranks == 1:
        print("One rank has no all-reduces to save; the gain comes with tensor parallelism.")
    print(f"\n{demo.prompt}\n")
    width = min(console().width, 100) // 2 - 1
    console().print(
        Columns(
            [
                Panel(demo.answer_before or "(nothing)", title="original", width=width),
                Panel(demo.answer_after or "(nothing)", title="fewer steps", width=width),
            ]
        )
    )


def _where(demo: Demo) -> str:
    """For example `2 tensor-parallel ranks, cpu`."""
    ranks = f"{demo.ranks} tensor-parallel ranks" if demo.ranks > 1 else "one process"
    return f"{ranks}, {demo.device}"


def _rate(timing: Timing) -> str:
    """Tokens per second of a `decode` timing: the median (slowest-fastest)."""
    fastest, slowest = 1 / min(timing.seconds), 1 / max(timing.seconds)
    return f"{1 / timing.median:.1f} ({slowest:.1f}-{fastest:.1f})"
