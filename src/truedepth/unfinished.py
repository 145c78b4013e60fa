"""What a long run keeps beside its output until it is done: a killed run is gone on with."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from truedepth.errors import TruedepthError

SETTINGS = "settings.json"


def beside(out: Path, what: str) -> Path:
    """The directory of an unfinished `calibration` or `healing` that will be `out`."""
    return out.with_name(f".{out.name}.{what}")


@contextmanager
def unfinished(
    directory: Path, settings: Mapping[str, Any], *, begin_again: bool
) -> Iterator[Path]:
    """A run's directory, locked, with what a run of the same settings left there or empty.

    Args:
        directory: Made where it is not there.
        settings: All that a result depends on, as JSON can hold it.
        begin_again: Remove what a run of other settings left; else it is refused.

    Raises:
        TruedepthError: Another run is at work there, left other settings, or it cannot be written.
    """
    text = json.dumps(settings, indent=1)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise TruedepthError(f"Cannot write to {directory}: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = directory / SETTINGS
        before = held.read_text(encoding="utf-8") if held.exists() else None
        if before != text:
            if before is not None and not begin_again:
                changed = _changed(json.loads(before), json.loads(text))
                raise TruedepthError(
                    f"An unfinished run with other settings is in {directory} ({changed}); give"
                    " these to go on with it, or --restart to begin again."
                )
            _empty(directory)
            (partial := held.with_suffix(".partial")).write_text(text, encoding="utf-8")
            partial.rename(held)
        yield directory
    except BlockingIOError as error:
        raise TruedepthError(f"Another run is at work in {directory}.") from error
    finally:
        os.close(lock)


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}" for name in names)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
