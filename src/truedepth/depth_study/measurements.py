"""The measured schedules of one model, text and setting, written to a directory as they come.

Each line of `measurements.jsonl` is a schedule and the NLL of every window. The first line says
what the figures were measured on; a directory with another model, text or setting is refused.
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
    """The schedule's name, for example `0 1 2+3 4`."""
    return " ".join(map(str, schedule))


class Measurements:
    """Measurements of a directory, as a context manager that holds a lock on their file.

    Every measurement is written to the file as it is added.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """Open a directory's measurements, or start new ones.

        Args:
            directory: Created if it does not exist.
            identity: What must be equal for figures to be comparable; JSON-compatible data.

        Raises:
            TruedepthError: The directory holds something else or cannot be written, or another run
                is using it.
        """
        self.nll: dict[str, Tensor] = {}
        """By the name of the schedule: `[windows]` float64, nats per token."""

        path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not path.exists() and any(directory.iterdir()):
                raise TruedepthError(
                    f"{directory} is not empty and holds no study; give another directory."
                )
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise TruedepthError(f"Cannot write to {directory}: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise TruedepthError(
                f"Another run is using {directory}; wait for it to end."
            ) from error
        try:
            self._read(path, identity)
        except BaseException:
            self._file.close()
            raise

    def add(self, schedule: Schedule, nll: Tensor) -> None:
        """Keep the NLL of a schedule.

        Args:
            schedule: The schedule.
            nll: `[windows]`, nats per token.

        Raises:
            TruedepthError: The file cannot be written.
        """
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
        with suppress(OSError):  # a write that failed before fails again here
            self._file.close()

    def _read(self, path: Path, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        try:
            text = self._file.read()
        except UnicodeDecodeError as error:
            raise TruedepthError(f"{path} is damaged; remove it to start again.") from error
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a run was killed while writing the last line
            self._file.truncate(len(whole.encode()))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            for line in lines[1:]:
                self.nll[line["schedule"]] = torch.tensor(line["nll"], dtype=torch.float64)
            held = dict(lines[0]["measured_on"]) if lines else None
        except (ValueError, KeyError, TypeError) as error:
            raise TruedepthError(f"{path} is damaged; remove it to start again.") from error
        if held is None:
            self._write({"measured_on": identity})
            return
        for key in identity:
            if held.get(key) != identity[key]:
                raise TruedepthError(
                    f"{path.parent} holds measurements with another {key}: {held.get(key)}, not"
                    f" {identity[key]}; give another directory."
                )

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise TruedepthError(
                f"Writing {self._file.name} failed: {error.strerror}. Fix that, then run the same"
                " command again: it resumes from there.",
                exit_code=1,
            ) from error
