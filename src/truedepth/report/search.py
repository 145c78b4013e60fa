"""What `plan` prints, for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

from truedepth.planning.candidates import FORMS
from truedepth.planning.result import Search
from truedepth.report.tables import loss_text, plan_rows, print_rows


def print_search(found: Search, out: Path, where: str | None = None) -> None:
    """Print the plan that was found, its loss, and the frontier.

    Args:
        found: What a search found.
        out: The plan file.
        where: The link or device that the plan is to be fast on.
    """
    print_rows(
        [
            ("model", found.source),
            *plan_rows(found.plan),
            *_loss_rows(found),
            ("search", effort_text(found)),
            ("written", str(out)),
        ]
    )
    if where is None:
        _print_by_form(found)
    else:
        _print_by_time(found, where)


def _print_by_form(found: Search) -> None:
    """What each form of merging loses, by number of stages."""
    forms = [form for form in FORMS if any(form in point.by_form for point in found.frontier)]
    print(
        "\nExcess loss in nats per token, by number of stages (all-reduces): the sum over"
        "\nthe merges of the best plan in one form alone, as they are; of the best plan in"
        f"\nany form{', refitted' * found.calibrated}; and what whole plans lose:\n"
    )
    print_rows(
        [
            (
                str(point.plan.all_reduces),
                *(_number(point.by_form.get(form)) for form in forms),
                f"{point.predicted:.3f}",
                loss_text(point.measured) if point.measured else "-",
                _number(point.measured.kl if point.measured else None),
            )
            for point in found.frontier
        ],
        header=("stages", *forms, any_form(found), "measured", "KL"),
        words=(),
    )


def _print_by_time(found: Search, where: str) -> None:
    """What each number of stages takes and loses."""
    before, after = found.time_before, found.time_after
    assert before is not None  # the search was for speed
    assert after is not None
    print(
        f"\nPredicted time per token for {where}, stages fused where that is possible:"
        f"\n{before * 1e3:.3f} -> {after * 1e3:.3f} ms ({before / after:.2f})."
        "\n\nBy number of stages (all-reduces): predicted milliseconds per token of the plan of"
        "\nleast loss, the sum of its merges' excess losses, and what whole plans lose, in nats"
        "\nper token:\n"
    )
    print_rows(
        [
            (
                str(point.plan.all_reduces),
                f"{(point.time or 0.0) * 1e3:.3f}",
                f"{point.predicted:.3f}",
                loss_text(point.measured) if point.measured else "-",
                _number(point.measured.kl if point.measured else None),
            )
            for point in found.frontier
        ],
        header=("stages", "ms", any_form(found), "measured", "KL"),
        words=(),
    )


def any_form(found: Search) -> str:
    """What the sums over merges in any form are called: these are refitted if plans are."""
    return "refitted" if found.calibrated else "any"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _loss_rows(found: Search) -> list[tuple[str, str]]:
    limit = found.max_loss
    held = "" if limit is None else f"; the limit was {limit:.4f}"
    return [
        ("excess loss", f"{loss_text(found.loss)} nats per token on {found.loss.tokens:,} tokens"),
        (
            "held-out check",
            f"{loss_text(found.check)} nats per token on {found.check.tokens:,} other tokens{held}",
        ),
    ]


def effort_text(found: Search) -> str:
    """What a search measured, and the time it took."""
    return (
        f"{len(found.scores)} merges"
        + (f" ({found.hopeless} lose too much to be refitted)" if found.hopeless else "")
        + f" and {found.plans_measured} plans measured in {found.seconds / 60:.1f} min"
        f" ({found.forward_passes:,.0f} forward passes of one window)"
        + ("; stopped when time was up" if found.stopped else "")
    )
