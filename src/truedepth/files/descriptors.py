"""What a process and its children write to standard output and error, sent elsewhere."""

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
