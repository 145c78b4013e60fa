"""The exception for what a user can put right, and other exceptions in one line."""

from __future__ import annotations

import textwrap


class TruedepthError(Exception):
    """Something the user can put right.

    The message is one sentence with the actual values and the way out. The command line prints it
    alone and exits with `exit_code`: 2 for wrong usage or input, 1 if the input was valid and
    something else failed (a full disk, logits that are NaN).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """`ValueError: too large.`: an error's type and the first line of its message, as the end of
    a sentence. A line of more than 200 characters is cut.
    """
    lines = str(error).strip().splitlines() or [""]
    said = textwrap.shorten(lines[0], 200, placeholder=" …")
    name = type(error).__name__
    return f"{name}: {said.rstrip('.')}." if said else f"{name}."
