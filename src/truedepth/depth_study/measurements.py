"""The measured schedules of one model, text and setting, written to a directory as they come.

Each line of `measurements.jsonl` is a schedule and the NLL of every window. The first line says
what the figures were measured on; a directory with another model, text or setting is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truedepth.depth_study.schedule import Schedule
from truedepth.errors import TruedepthError
from truedepth.files.kept_lines import KeptLines

FILE = "measurements.jsonl"


def name_of(schedule: Schedule) -> str:
    """The schedule's name, for example `0 1 2+3 4`."""
    return " ".join(map(str, schedule))


class Measurements(KeptLines):
    """Measurements of a directory; each is written to its file as it is added."""

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

        try:
            if not (directory / FILE).exists() and any(directory.iterdir()):
                raise TruedepthError(
                    f"{directory} is not empty and holds no study; give another directory."
                )
        except FileNotFoundError:
            pass
        except OSError as error:
            raise TruedepthError(f"Cannot write to {directory}: {error.strerror}.") from error
        super().__init__(directory / FILE, "measurements", "measured_on", identity)
        try:
            for line in self.lines:
                self.nll[line["schedule"]] = torch.tensor(line["nll"], dtype=torch.float64)
        except (KeyError, TypeError, ValueError) as error:
            self.close()
            raise self.damaged from error

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
        self.write([{"schedule": name_of(schedule), "nll": rounded}])

    def __contains__(self, schedule: Schedule) -> bool:
        return name_of(schedule) in self.nll

    def __getitem__(self, schedule: Schedule) -> Tensor:
        return self.nll[name_of(schedule)]
