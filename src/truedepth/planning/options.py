"""Options of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from truedepth.calibration.options import Calibration
from truedepth.errors import TruedepthError
from truedepth.options import Bounds, OneOf, check_fields
from truedepth.plan.stages import MAX_RANKS

SEARCH_CALIBRATION = Calibration(tokens=1 << 14)
"""How the plans of a search are refitted by default: on fewer tokens than the plan that is
chosen."""


@dataclass(frozen=True)
class Merges:
    """What a search may merge.

    Raises:
        TruedepthError: A value is out of bounds, or stages are to be local in the form pairs.
    """

    form: Annotated[str, OneOf("auto", "pairs")] = "auto"
    """What to merge. auto: sub-layers or layers, whichever lose least; pairs: groups of layers
    alone, which llama.cpp runs too."""

    max_group: Annotated[int, Bounds(2)] = 2
    """Largest number of layers in a group, and in a stage of whole layers where these read one
    state already, that a search considers."""

    max_run: Annotated[int, Bounds(2)] = 3
    """Largest number of sub-layers in any other stage that a search considers."""

    local: Annotated[int | None, Bounds(2, MAX_RANKS)] = None
    """Number of tensor-parallel ranks that stages may be local to. Default: no stage is local."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.form == "pairs" and self.local is not None:
            raise TruedepthError("Pairs of layers have no local stages: leave --local or them out.")
