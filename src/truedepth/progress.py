"""What a run says on standard error while it works: progress on a terminal, and notes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


@contextmanager
def working(description: str) -> Iterator[None]:
    """Show a spinner for work of unknown length."""
    console = Console(stderr=True)
    with console.status(description) if console.is_terminal else nullcontext():
        yield


@contextmanager
def progress_bar(
    description: str, total: int, unit: str = "steps"
) -> Iterator[Callable[[float], object]]:
    """Show a bar of `total` steps or bytes; yields the function that advances it."""
    count = DownloadColumn(binary_units=False) if unit == "bytes" else MofNCompleteColumn()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        count,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


def note(sentence: str) -> None:
    """Say something that the user may want to know and need not act on, once per process."""
    if sentence not in _noted:
        _noted.add(sentence)
        print(f"truedepth: note: {sentence}", file=sys.stderr)


_noted: set[str] = set()
