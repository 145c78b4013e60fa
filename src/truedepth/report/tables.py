"""Tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from truedepth.evaluate import Perplexity


def console() -> Console:
    """Standard output; texts are printed as they are, brackets and all."""
    return Console(markup=False, highlight=False)


def print_rows(rows: Sequence[Sequence[str]], header: Sequence[str] | None = None) -> None:
    """Print columns: the first left-aligned, in a table with a header the others right-aligned."""
    table = Table(show_header=header is not None, box=None, pad_edge=False, header_style="bold")
    for index in range(len(rows[0])):
        numeric = index > 0 and header is not None
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


def perplexity_rows(measured: Perplexity) -> list[tuple[str, str]]:
    """What `truedepth eval` prints."""
    rows = [
        ("model", measured.model),
        *([("original", measured.against)] if measured.against else []),
        ("text", measured.text),
        ("windows", f"{measured.windows} of {measured.window} tokens, {measured.tokens} predicted"),
        ("NLL", f"{measured.nll:.4f} nats a token"),
        ("perplexity", f"{measured.perplexity:.2f}"),
    ]
    if measured.excess is None:
        return rows
    rows += [
        ("NLL of the original", f"{measured.against_nll:.4f} nats a token"),
        ("perplexity of the original", f"{measured.against_perplexity:.2f}"),
        ("excess loss", excess_text(measured) + " nats a token"),
        ("KL(original‖model)", f"{measured.kl:.4f} nats a token"),
        ("top-1 agreement", f"{measured.top1_agreement:.1%}"),
    ]
    return rows


def excess_text(measured: Perplexity) -> str:
    """`0.9198 ± 0.0212`: the excess and its standard error over windows."""
    spread = "" if measured.excess_stderr is None else f" ± {measured.excess_stderr:.4f}"
    return f"{measured.excess:.4f}{spread}"
