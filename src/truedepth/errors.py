"""The exception for what a user can put right, and the reasons that other exceptions give."""

from __future__ import annotations

MAX_REASON = 400
"""Characters of an error of a library that a sentence repeats."""


class TruedepthError(Exception):
    """Something the user can put right.

    The message is one sentence with the actual values and the way out. The command line prints it
    alone and exits with `exit_code`: 2 for wrong usage or input, 1 if the input was valid and
    something else failed (a full disk, logits that are NaN).
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def reason_of(error: BaseException) -> str:
    """`ValueError: too large.`: an error's type and message as the end of a sentence in one line.

    An error that others led to is followed by the innermost of them, unless it says that itself.
    Long messages are cut.
    """
    said, cause = _said(error), error
    seen = {id(error)}
    while cause.__cause__ is not None and id(cause.__cause__) not in seen:
        cause = cause.__cause__
        seen.add(id(cause))
    why = " ".join(str(cause).split()).rstrip(".")
    if not why or why in said:
        return f"{_cut(said, MAX_REASON)}."
    return f"{_cut(said, MAX_REASON // 2)}, because of {_cut(_said(cause), MAX_REASON // 2)}."


def _said(error: BaseException) -> str:
    message = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2].rstrip()} …"
