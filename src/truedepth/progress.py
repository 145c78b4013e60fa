"""Progress bars: on standard error, gone when done, none where nobody watches."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

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
    """A spinner for work whose length is not known."""
    console = Console(stderr=True)
    with console.status(description) if console.is_terminal else nullcontext():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Around libraries and their child processes that print: only their bars come through, and
    these only where somebody watches.
    """
    watched = sys.stderr.isatty()
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere, os.fdopen(kept, "w") as terminal:
        os.dup2(nowhere.fileno(), 2)
        shown = terminal if watched else io.StringIO()
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(shown):
                yield
        finally:
            os.dup2(kept, 2)


@contextmanager
def progress_bar(
    description: str, total: int, unit: str = "steps"
) -> Iterator[Callable[[float], object]]:
    """A bar of `total` steps or bytes; gives the function that advances it."""
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
