"""Options of a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from truedepth.errors import TruedepthError
from truedepth.options import Bounds, check_fields

if TYPE_CHECKING:
    import torch


SHORTEST = 2  # tokens per window: one is predicted

IN_FLOAT32 = (
    "Compute in float32: truedepth convert --compute-dtype float32, truedepth plan --dtype float32,"
    " or Calibration(dtype=torch.float32) in Python."
)


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on, and how.

    Raises:
        TruedepthError: A value is out of bounds, or the tokens make fewer than two windows.
    """

    text: Sequence[str | Path] = ()
    """Text to calibrate on: a `.txt` or `.jsonl` file. Default: Python's own documentation.

    Several files have equal shares of the tokens; what a short one lacks, the others give."""

    own_text: Annotated[float | None, Bounds(0, 1)] = None
    """Share of the tokens that the model writes itself. Default: 0.5 without `text`, else 0.

    What a model writes resembles what it was trained on."""

    tokens: Annotated[int, Bounds(1)] = 1 << 16
    """Number of tokens to calibrate on."""

    window: Annotated[int | None, Bounds(SHORTEST)] = None
    """Tokens per window. Default: 512, or the model's positions if these are fewer."""

    check: Annotated[int, Bounds(0)] = 16
    """Windows, in addition to these tokens, on which the calibrated model is compared with the
    original."""

    device: str | torch.device | None = None
    """Device to run on, such as cpu, cuda or cuda:1. Default: the first GPU, else the CPU."""

    dtype: torch.dtype | None = None
    """Dtype that the layers compute in. Default: on a CPU bfloat16 if it is fast there, else
    float32; on a GPU the dtype of the weights."""

    activation_dtype: torch.dtype | None = None
    """Dtype of the hidden states, which are kept for every token. Default: float32."""

    batch_size: Annotated[int, Bounds(1)] = 8
    """Windows per forward pass."""

    workspace: Path | None = None
    """Directory for the hidden states, as memory-mapped files. Default: they stay in memory."""

    seed: int = 0
    """Random seed for the order of the windows and for the text that the model writes.

    The order decides on which windows penalties are chosen."""

    def __post_init__(self) -> None:
        check_fields(self)
        window = self.window or SHORTEST
        if self.tokens < 2 * window:
            raise TruedepthError(
                f"{self.tokens} calibration tokens are too few: two windows of {window} are"
                " the least, one to fit on and one to choose penalties on."
            )

    @property
    def own_share(self) -> float:
        """`own_text`, or its default."""
        if self.own_text is None:
            return 0.0 if self.text else 0.5
        return self.own_text
