"""What config.json says of how a checkpoint was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def calibration_words(record: Mapping[str, Any]) -> str:
    """What a checkpoint was calibrated on, from its record."""
    own = record["own_text"]
    parts = [", ".join(record["text"])] if own < 1 else []
    parts += [f"{own:.0%} the model's own text" if own < 1 else "the model's own text"] * (own > 0)
    return f"{record['tokens']:,} tokens, " + " and ".join(parts)
