"""Progress bars: on standard error, gone when done, none where nobody watches."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

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
def redirected(to: IO[str], *descriptors: int) -> Iterator[list[int]]:
    """What this process and its children write to these goes to a file; gives where it went."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in descriptors]
    try:
        for number in descriptors:
            os.dup2(to.fileno(), number)
        yield kept
    finally:
        for number, own in zip(descriptors, kept, strict=True):
            os.dup2(own, number)
            os.close(own)


@contextmanager
def quiet() -> Iterator[None]:
    """Around libraries and their child processes that print: only their bars come through, and
    these only where somebody watches.
    """
    watched = sys.stderr.isatty()
    with (
        Path(os.devnull).open("w") as nowhere,
        redirected(nowhere, 2) as (kept,),
        os.fdopen(kept, "w", closefd=False) as terminal,
        redirect_stdout(io.StringIO()),
        redirect_stderr(terminal if watched else io.StringIO()),
    ):
        yield


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
