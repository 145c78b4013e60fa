"""What to calibrate on, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from truedepth.runtime.device import default_device, fast_dtype
from truedepth.sources.source import Source


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on, and how."""

    text: Sequence[str | Path] = ()
    """`.txt` or `.jsonl` files, each with the same share of the tokens while it lasts; by default
    the documentation that Python carries."""

    own_text: float | None = None
    """Share of the tokens that the model writes itself: it knows what it was trained on. By default
    half where no text is given, and nothing where some is."""

    tokens: int = 1 << 16
    window: int = 512
    """Tokens a window."""

    check: int = 16
    """Windows beside these tokens that the calibrated model is compared with the original on."""

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    """In which layers compute; by default bfloat16 where that is fast."""

    activation_dtype: torch.dtype = torch.float32
    """Of the states that are kept for every token."""

    batch_size: int = 8
    """Windows a forward pass."""

    workspace: Path | None = None
    """A directory for memory-mapped states; by default they are in memory."""

    seed: int = 0
    """Of the order of windows, which decides which of them choose penalties, and of own text."""

    @property
    def own_share(self) -> float:
        """`own_text`, or what it is by default."""
        if self.own_text is None:
            return 0.0 if self.text else 0.5
        return self.own_text

    def place(self, source: Source) -> tuple[torch.device, torch.dtype]:
        """Where layers compute, and in what."""
        device = torch.device(self.device or default_device())
        return device, self.dtype or fast_dtype(source, device)
