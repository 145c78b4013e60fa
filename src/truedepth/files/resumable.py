"""What a long run keeps beside its output until it is done, so that a killed run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.files.atomic import USED_UP, discard, empty, locked_directory, whole_file

SETTINGS = "settings.json"


@contextmanager
def unfinished(
    directory: Path, settings: Mapping[str, Any], *, begin_again: bool
) -> Iterator[Path]:
    """A run's working directory, locked: as a run with the same settings left it, or empty.

    It is removed when the block ends without an exception.

    Args:
        directory: Made if it does not exist.
        settings: Everything that the result depends on, as JSON data.
        begin_again: Remove what a run with other settings left, instead of refusing it.

    Yields:
        The directory.

    Raises:
        TruedepthError: Another run is using it, a run with other settings left it unfinished,
            or it cannot be written. An OSError in the block, such as a full disk, is raised as one
            too.
    """
    text = json.dumps(settings, indent=1)
    lock = locked_directory(
        directory, busy=f"Another run is using {directory}; wait for it to end."
    )
    try:
        held, used_up = directory / SETTINGS, (directory / USED_UP).exists()
        before = held.read_text(encoding="utf-8") if held.exists() else None
        if before != text:
            if before is not None and not (begin_again or used_up):
                changed = _changed(json.loads(before), json.loads(text))
                raise TruedepthError(
                    f"{directory} holds an unfinished run with other settings ({changed}); give"
                    " these to resume it, or --restart to discard it and start over."
                )
            empty(directory)
            with whole_file(held) as partial:
                partial.write_text(text, encoding="utf-8")
        (directory / USED_UP).unlink(missing_ok=True)
        yield directory
        discard(directory)
    except OSError as error:
        raise TruedepthError(
            f"Keeping what is done in {directory} failed: {error.strerror or error}. Fix that,"
            " then run the same command again: it resumes from there.",
            exit_code=1,
        ) from error
    finally:
        os.close(lock)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}" for name in names)
