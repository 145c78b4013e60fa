"""Options of a search."""

from __future__ import annotations

from truedepth.calibration.options import Calibration

SEARCH_CALIBRATION = Calibration(tokens=1 << 14)
"""How the plans of a search are refitted by default: on fewer tokens than the plan that is
chosen."""
