"""What `plan` prints, for a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

from truedepth.plan.plan import Plan
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
    print("\nThe best plan found at each effective depth (losses in nats per token):\n")
    print_rows(
        [
            (
                str(point.plan.effective_depth),
                f"{point.predicted:.3f}",
                loss_text(point.measured) if point.measured else "-",
                f"{point.measured.kl:.3f}" if point.measured else "-",
                spans_text(point.plan),
            )
            for point in found.frontier
        ],
        header=("depth", "sum of groups", "excess loss", "KL", "paired layers"),
        words=(4,),
    )


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
        f"{found.plans_measured} plans measured in {found.seconds / 60:.1f} min"
        f" ({found.forward_passes:,.0f} forward passes of one window)"
        + ("; stopped when time was up" if found.stopped else "")
    )


def spans_text(plan: Plan) -> str:
    """Spans of adjacent groups: `12-19, 24-27` of pairs, `12-17 by 3` of groups of three layers."""
    spans: list[list[int]] = []  # first layer, last layer, layers per group
    for group in plan.groups:
        if len(group) == 1:
            continue
        if spans and (spans[-1][1] + 1, spans[-1][2]) == (group[0], len(group)):
            spans[-1][1] = group[-1]
        else:
            spans.append([group[0], group[-1], len(group)])
    return ", ".join(
        f"{first}-{last}" + (f" by {size}" if size > 2 else "") for first, last, size in spans
    )
