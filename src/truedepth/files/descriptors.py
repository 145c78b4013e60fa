"""Redirects what a process and its children write to standard output and error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO


@contextmanager
def redirected(to: IO[str], *descriptors: int) -> Iterator[list[int]]:
    """Send what this process and its children write to these descriptors to a file.

    Yields:
        Copies of the descriptors as they were before.
    """
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
    """Silence libraries and their child processes: only their progress bars come through, and
    these only on a terminal.
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
