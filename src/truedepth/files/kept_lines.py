"""Results that a long run writes to a file as they come, a line of JSON each.

The first line says what they belong to; a file of something else is refused. A run that is killed
while it writes leaves a part of a line, which the next one removes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from truedepth.errors import TruedepthError


class KeptLines:
    """The lines of one file, as a context manager that holds a lock on it."""

    def __init__(self, path: Path, what: str, key: str, identity: Mapping[str, Any]) -> None:
        """Open a file, or start a new one.

        Args:
            path: The file; its directory is created if it does not exist.
            what: What the lines are, as errors call them.
            key: The only key of the first line.
            identity: The value of that key, JSON-compatible data that must be equal for the lines
                to be used.

        Raises:
            TruedepthError: The file holds lines of something else, is damaged or cannot be written,
                or another run is using it.
        """
        self.lines: list[dict[str, Any]] = []
        """What the file holds, without the first line."""

        self._path, self._key = path, key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise TruedepthError(f"Cannot write to {path.parent}: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(what, identity)
        except BlockingIOError as error:
            self._file.close()
            raise TruedepthError(
                f"Another run is using {path.parent}; wait for it to end."
            ) from error
        except BaseException:
            self._file.close()
            raise

    @property
    def damaged(self) -> TruedepthError:
        """The exception for lines that are not what they should be."""
        return TruedepthError(f"{self._path} is damaged; remove it to start again.")

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write lines behind the others, at once.

        Raises:
            TruedepthError: The file cannot be written.
        """
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write("".join(json.dumps(line) + "\n" for line in lines))
            self._file.flush()
        except OSError as error:
            raise TruedepthError(
                f"Writing {self._path} failed: {error.strerror}. Fix that, then run the same"
                " command again: it resumes from there.",
                exit_code=1,
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which ends the lock."""
        with suppress(OSError):  # a write that failed before fails again here
            self._file.close()

    def _read(self, what: str, identity: Mapping[str, Any]) -> None:
        self._file.seek(0)
        try:
            text = self._file.read()
        except UnicodeDecodeError as error:
            raise self.damaged from error
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._file.truncate(len(whole.encode()))
        try:
            first, *self.lines = [json.loads(line) for line in whole.splitlines()] or [{}]
            held = dict(first[self._key]) if whole else None
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged from error
        if held is None:
            self.write([{self._key: identity}])
            return
        for key in identity:
            if held.get(key) != identity[key]:
                raise TruedepthError(
                    f"{self._path.parent} holds {what} with another {key}: {held.get(key)}, not"
                    f" {identity[key]}; give another directory."
                )
