"""What schedules gave, kept in a directory as it comes: one model, one text, one way of measuring.

A line of `measurements.jsonl` is a schedule and the NLL of every window. The first line says what
was measured on; a directory of another model, text or setting is refused, never mixed in.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from truedepth.depth_study.schedule import Schedule
from truedepth.errors import TruedepthError

FILE = "measurements.jsonl"


def name_of(schedule: Schedule) -> str:
    """`0 1 2+3 4`."""
    return " ".join(map(str, schedule))


class Measurements:
    """A context: the file is locked for as long as it is open, and what is added is written."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """Open a directory's measurements, or begin them.

        Args:
            directory: Made where it does not exist.
            identity: What figures can be compared under; plain data.

        Raises:
            TruedepthError: The directory holds something else, or another run is at work in it.
        """
        self.nll: dict[str, Tensor] = {}
        """By the name of the schedule: `[windows]` float64, nats a token."""

        path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(directory.iterdir()):
                raise TruedepthError(f"{directory} is not empty and holds no study; give another.")
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise TruedepthError(f"Cannot write to {directory}: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise TruedepthError(f"Another run is at work in {directory}.") from error
        try:
            self._read(path, identity)
        except BaseException:
            self._file.close()
            raise

    def add(self, schedule: Schedule, nll: Tensor) -> None:
        """Keep what a schedule gave: `[windows]`. Raises TruedepthError where it cannot."""
        rounded = [round(value, 6) for value in nll.tolist()]
        self.nll[name_of(schedule)] = torch.tensor(rounded, dtype=torch.float64)
        self._write({"schedule": name_of(schedule), "nll": rounded})

    def __contains__(self, schedule: Schedule) -> bool:
        return name_of(schedule) in self.nll

    def __getitem__(self, schedule: Schedule) -> Tensor:
        return self.nll[name_of(schedule)]

    def __enter__(self) -> Measurements:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # of a write that failed already
            self._file.close()

    def _read(self, path: Path, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        try:
            text = self._file.read()
        except UnicodeDecodeError as error:
            raise TruedepthError(f"{path} is damaged; remove it to begin again.") from error
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a run was killed while it wrote the last line
            self._file.truncate(len(whole.encode()))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            for line in lines[1:]:
                self.nll[line["schedule"]] = torch.tensor(line["nll"], dtype=torch.float64)
            held = dict(lines[0]["measured_on"]) if lines else None
        except (ValueError, KeyError, TypeError) as error:
            raise TruedepthError(f"{path} is damaged; remove it to begin again.") from error
        if held is None:
            self._write({"measured_on": identity})
            return
        for key in identity:
            if held.get(key) != identity[key]:
                raise TruedepthError(
                    f"{path.parent} holds measurements with another {key}, {held.get(key)} instead"
                    f" of {identity[key]}; give another directory."
                )

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise TruedepthError(
                f"Writing {self._file.name} failed: {error.strerror}; with that put right the same"
                " command goes on from what was measured before.",
                exit_code=1,
            ) from error
