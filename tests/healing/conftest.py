"""What the tests of healing share."""

from __future__ import annotations

import pytest

from truedepth.healing.options import Healing, TextPart


@pytest.fixture
def options(prose):
    """Twelve steps of four short windows."""
    return Healing(
        text=[TextPart(str(prose))],
        tokens=32 * 4 * 12,
        sequence_length=32,
        validation=8,
        batch_size=4,
        micro_batch_size=2,
        learning_rate=1e-3,
        eval_every=4,
        device="cpu",
    )
