"""What the command line says of an error: one sentence, and with --debug where it comes from."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from truedepth.errors import TruedepthError, reason_of

DEBUG = "--debug"


def reported(app: Callable[[list[str]], object], words: Sequence[str]) -> int:
    """Run a command line and report its error, if any, on standard error.

    Args:
        app: Takes the words but `--debug`, which may stand anywhere before a `--`.
        words: What the user wrote.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong input, 130 interrupted.
    """
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if word != DEBUG]
    try:
        app([*options, *words[end:]])
    except KeyboardInterrupt:
        said, code = "Interrupted.", 130
    except Exception as error:
        if len(options) < end:
            traceback.print_exc()
        said, code = _sentence(error)
    else:
        return 0
    print(f"truedepth: {said}", file=sys.stderr)
    return code


def _sentence(error: Exception) -> tuple[str, int]:
    if isinstance(error, TruedepthError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{' '.join(str(error.strerror or error).split()).rstrip('.')}{where}.", 1
    # torch's own are OutOfMemoryError on a GPU, and any RuntimeError on a CPU.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemoryError"} or "t allocate memory" in str(error):
        return f"There is not enough memory: {reason_of(error)}", 1
    said = reason_of(error).removesuffix(".")
    return f"unexpected error: {said}; run the command again with {DEBUG} to see where.", 1
