"""What to heal, on what, and how. Knows no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from truedepth.errors import TruedepthError

if TYPE_CHECKING:
    import torch

DEFAULT_DATA = "togethercomputer/RedPajama-Data-1T-Sample"


@dataclass(frozen=True)
class TextPart:
    """One text of a mixture."""

    name: str
    """A `.txt` or `.jsonl` file, a directory of such files, or a data set of the Hugging Face hub
    with a column `text`, as `owner/name` or `owner/name:configuration`."""

    weight: float = 1.0
    """Its share of the tokens, in proportion to the others'."""

    @property
    def title(self) -> str:
        """The name without the directories it is in."""
        path = Path(self.name).expanduser()
        return path.resolve().name if path.exists() else self.name

    @classmethod
    def parse(cls, text: str) -> TextPart:
        """`NAME` or `NAME=WEIGHT`.

        Raises:
            TruedepthError: The weight is not a number above 0.
        """
        name, separator, weight = text.rpartition("=")
        if not separator or Path(text).expanduser().exists():
            return cls(text)
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise TruedepthError(f"{text!r}: the weight {weight!r} is not a number above 0.")
        return cls(name, number)


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    next_token: float = 0.0
    """a: 0 is distillation alone, 1 the training of language models as usual."""

    temperature: float = 1.0
    """τ"""

    hidden: float = 0.0
    """b"""


class Train(StrEnum):
    """Which parameters are trained."""

    paired = "paired"
    """Those of wide layers."""

    all = "all"
    lora = "lora"
    """Low-rank additions to the linear maps of wide layers."""


class Schedule(StrEnum):
    """How the learning rate falls, after the warm-up."""

    linear = "linear"
    cosine = "cosine"


@dataclass(frozen=True)
class Healing:
    """What to train, on what, and how."""

    text: Sequence[TextPart] = (TextPart(DEFAULT_DATA),)
    tokens: int = 2_000_000
    """To train on, rounded down to whole steps; shorter text is read several times."""

    sequence_length: int = 512
    validation: int = 64
    """Windows that are never trained on; the checkpoint that is best on them is kept."""

    train: Train = Train.paired
    rank: int = 16
    """Of low-rank additions."""

    objective: Objective = field(default_factory=Objective)
    keep_predictions: int = 0
    """Most likely tokens of the original's predictions to compute before training and keep on disk:
    the original is then in no memory during it, and text that is read several times is predicted
    once. 0 runs the original beside the student, on all tokens."""

    learning_rate: float = 5e-5
    schedule: Schedule = Schedule.cosine
    warmup: float = 0.05
    """Share of the steps."""

    batch_size: int = 4
    """Windows a step, on all devices."""

    micro_batch_size: int = 4
    """Windows a forward pass, on one."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    eval_every: int = 50
    """Steps."""

    seed: int = 0
    device: str | None = None
    dtype: torch.dtype | None = None
    """In which the models compute: bfloat16, the trained weights and the optimizer staying float32,
    or float32; by default float32 on a CPU and bfloat16 elsewhere."""

    tensorboard: Path | None = None
    """A directory for its logs."""

    @property
    def steps(self) -> int:
        """Of the optimizer."""
        return self.tokens // (self.batch_size * self.sequence_length)
