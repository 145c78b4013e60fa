"""Tables for a terminal of 80 columns, and what several of them show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from truedepth.checkpoint.records import Loss
from truedepth.plan.plan import Plan


def console() -> Console:
    """A console on standard output that prints text literally, without markup."""
    return Console(markup=False, highlight=False)


def print_rows(
    rows: Sequence[Sequence[str]],
    header: Sequence[str] | None = None,
    words: Sequence[int] = (0,),
) -> None:
    """Print a table without lines.

    Args:
        rows: The cells, row by row.
        header: Titles of the columns; without them, every column is aligned to the left.
        words: With a header, indices of the columns that hold words and are aligned to the left;
            the others hold numbers and are aligned to the right.
    """
    table = Table(show_header=header is not None, box=None, pad_edge=False, header_style="bold")
    for index in range(len(rows[0])):
        numeric = header is not None and index not in words
        table.add_column(
            header[index] if header else "",
            justify="right" if numeric else "left",
            style="dim" if index == 0 and not header else "",
            no_wrap=index == 0,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*row)
    console().print(table)


@dataclass(frozen=True)
class Rows:
    """A table, to be printed or written as Markdown."""

    rows: Sequence[Sequence[str]]
    header: Sequence[str] | None = None
    words: Sequence[int] = (0,)
    """See `print_rows`."""

    def markdown(self) -> str:
        """The table as Markdown, without an end of line."""
        header = self.header or [""] * len(self.rows[0])
        lines = ["-:" if self.header and i not in self.words else "-" for i, _ in enumerate(header)]
        cells = [header, lines, *self.rows]
        return "\n".join("| " + " | ".join(row).replace("\n", " ") + " |" for row in cells)


def print_tables(tables: Iterable[Rows]) -> None:
    """Print tables, with an empty line between them."""
    for number, table in enumerate(tables):
        if number:
            console().print()
        print_rows(table.rows, table.header, table.words)


def plan_rows(plan: Plan, executed: Plan | None = None) -> list[tuple[str, str]]:
    """The rows that describe a plan; `executed` is the plan as engines run it, if that differs."""
    depths = f"{plan.num_layers} -> {plan.effective_depth}"
    stages = []
    if plan.merged:
        holds = "1 holds" if len(plan.merged) == 1 else f"{len(plan.merged)} hold"
        stages = [("stages", f"{holds} several sub-layers (A: attention, F: FFN)")]
        if plan.ranks is not None:
            local = "those with | are local: computed by each rank with its own parts"
            stages += [("", local), ("ranks", f"{plan.ranks}, and no other number")]
    else:  # Δ, the paper's, counts layers in groups
        depths += f" (Δ = {plan.paired_layers})"
    before, after = plan.unpaired.all_reduces, (executed or plan).all_reduces
    return [
        ("plan", str(plan)),
        *stages,
        ("effective depth", depths),
        ("all-reduces", f"{before} -> {after} per token with tensor parallelism"),
    ]


def loss_text(loss: Loss) -> str:
    """`0.0192 ± 0.0373`: the excess loss and its standard error over windows."""
    return f"{loss.excess:.4f}" + ("" if loss.stderr is None else f" ± {loss.stderr:.4f}")
