"""What `convert` prints, for a terminal of 80 columns."""

from __future__ import annotations

from rich.filesize import decimal

from truedepth.conversion import Conversion
from truedepth.planning.result import Search
from truedepth.report.search import effort_text
from truedepth.report.tables import loss_text, plan_rows, print_rows


def print_conversion(done: Conversion, found: Search | None = None) -> None:
    """Print what was written, and how its plan was found."""
    print_rows(
        [
            ("model", f"{done.source} ({done.origin})"),
            *([("dequantized", f"from {done.quantization}")] if done.quantization else []),
            *plan_rows(done.plan, done.executed_plan),
            *([("search", effort_text(found))] if found else []),
            *calibration_rows(done),
            ("written", f"{done.path} ({decimal(done.size)} of weights)"),
        ]
    )


def calibration_rows(done: Conversion) -> list[tuple[str, str]]:
    """The rows that describe a calibration; none if there was none."""
    if done.calibration is None:
        return []
    rows = [("calibrated", f"on {done.calibration}")]
    if loss := done.calibration.check:
        rows.append(
            ("held-out check", f"{loss_text(loss)} nats per token on {loss.tokens:,} other tokens")
        )
    return rows
