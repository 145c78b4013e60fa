"""The one exception type that a user's mistake raises."""

from __future__ import annotations

import textwrap


class TruedepthError(Exception):
    """Something the user can put right.

    The message is one sentence that holds the actual values and the way out; the command line
    prints it alone and exits with `exit_code`: 2 for wrong usage or input, 1 where the input was
    fine and something else failed (a full disk, logits that are not numbers).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The error's first line, or of a long one the beginning, as the end of a sentence."""
    lines = str(error).strip().splitlines() or [""]
    said = textwrap.shorten(lines[0], 200, placeholder=" …")
    return f"{type(error).__name__}: {said.rstrip('.')}."
