"""What `plan` prints, for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

from truedepth.planning.candidates import FORMS
from truedepth.planning.search import Search
from truedepth.report.tables import loss_text, plan_rows, print_rows


def print_search(found: Search, out: Path) -> None:
    """Print the plan that was found, its loss, and the frontier."""
    print_rows(
        [
            ("model", found.source),
            *plan_rows(found.plan),
            *_loss_rows(found),
            ("search", effort_text(found)),
            ("written", str(out)),
        ]
    )
    forms = [form for form in FORMS if any(form in point.by_form for point in found.frontier)]
    print(
        "\nExcess loss in nats per token, by number of all-reduces (twice the effective"
        "\ndepth): the sum over the merges of the best plan in one form alone and in any,"
        "\nand what whole plans lose:\n"
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
        header=("all-reduces", *forms, "any", "measured", "KL"),
        words=(),
    )


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
