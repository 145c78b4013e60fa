"""The minutes that a search may take."""

from __future__ import annotations

import math
from time import monotonic

from truedepth.errors import TruedepthError


class OutOfTimeError(Exception):
    """The budget is spent."""


class Budget:
    """A clock that runs from the moment it is made."""

    def __init__(self, minutes: float | None) -> None:
        """Set the clock; None gives all the time there is."""
        self._minutes = math.inf if minutes is None else minutes
        self._start = monotonic()
        self.spent = False
        """Whether the time was up at the last check."""

    @property
    def seconds(self) -> float:
        """Seconds since the clock was set."""
        return monotonic() - self._start

    def check(self, share: float = 1.0) -> None:
        """Raise OutOfTimeError if this share of the time is over."""
        if self.seconds > 60 * self._minutes * share:
            self.spent = True
            raise OutOfTimeError

    def too_small(self) -> TruedepthError:
        """The error of a search that found nothing in time."""
        minutes = f"{self._minutes:g} minute{'s' * (self._minutes != 1)}"
        return TruedepthError(
            f"No fitting plan was measured within {minutes}; raise --budget.", exit_code=1
        )
