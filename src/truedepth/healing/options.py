"""The options of healing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from truedepth.errors import TruedepthError
from truedepth.options import Bounds, OneOf, Panel, check_fields

if TYPE_CHECKING:
    import torch

FROM_TEXT = "text"
"""Instead of a file of prompts: the first sentences of the text."""

SHORTEST = 2  # tokens per window: one is predicted

DEFAULT_DATA = "togethercomputer/RedPajama-Data-1T-Sample"

TEXT, TRAINED, MEMORY = Panel("Text"), Panel("What is trained"), Panel("Memory")
STEPS, RUN = Panel("Steps"), Panel("The run")


@dataclass(frozen=True)
class TextPart:
    """One part of a mixture of texts."""

    name: str
    """A `.txt` or `.jsonl` file, a directory of such files, or a dataset of the Hugging Face hub
    with a column `text`, as `owner/name` or `owner/name:configuration`."""

    weight: Annotated[float, Bounds(above=0)] = 1.0
    """Its share of the tokens, relative to the weights of the other parts."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def title(self) -> str:
        """The name without its directories."""
        path = Path(self.name).expanduser()
        return path.resolve().name if path.exists() else self.name

    @classmethod
    def parse(cls, text: str) -> TextPart:
        """A part from `NAME` or `NAME=WEIGHT`.

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
    """The loss that is minimised; `distillation.py` has the formula.

    Raises:
        TruedepthError: A value is out of bounds.
    """

    next_token: Annotated[float, Bounds(0, 1), TRAINED] = 0.0
    """Weight a of the next-token loss; the divergence from the original has the weight 1 - a. 0 is
    pure distillation, 1 ordinary language-model training."""

    temperature: Annotated[float, Bounds(above=0), TRAINED] = 1.0
    """Temperature τ of the divergence."""

    hidden: Annotated[float, Bounds(0), TRAINED] = 0.0
    """Weight b of the error of the hidden states behind what runs together."""

    divergence: Annotated[float, Bounds(0, 1), TRAINED] = 0.0
    """Which divergence β: 0 is KL(original ‖ student), 1 is KL(student ‖ original), and between
    them is the generalised Jensen-Shannon divergence (arXiv 2306.13649)."""

    on_policy: Annotated[float, Bounds(0, 1), TRAINED] = 0.0
    """Share of the windows whose end the student writes itself, by sampling, as it is trained."""

    rollout: Annotated[int, Bounds(1), TRAINED] = 128
    """Number of tokens that the student writes at the end of such a window."""

    def __post_init__(self) -> None:
        check_fields(self)


class Train(StrEnum):
    """Which parameters are trained."""

    paired = "paired"
    """All parameters of the wide layers, and of the sub-layers that share a stage."""

    all = "all"
    lora = "lora"
    """Low-rank additions to the linear maps of the same."""


class LearningRateSchedule(StrEnum):
    """How the learning rate falls after the warm-up."""

    linear = "linear"
    cosine = "cosine"


@dataclass(frozen=True)
class Healing:
    """What to train, on which text, and how.

    Raises:
        TruedepthError: A value is out of bounds, or values contradict each other.
    """

    text: Annotated[Sequence[TextPart], TEXT] = ()
    """Text to train on: a `.txt` or `.jsonl` file, a directory of such files, or a dataset of the
    Hugging Face hub; NAME=2 gives it twice the weight. Default: the answers to a file of prompts
    alone, or without one RedPajama's sample from the hub."""

    own_answers: Annotated[Sequence[TextPart], TEXT] = ()
    """Prompts that the original answers, to train on what it says itself: a `.jsonl` file with a
    `prompt`, or the `messages` of a chat, in every line; a `.txt` file with a prompt in every line;
    or the word "text", for the first sentences of --text. NAME=2 gives it twice the weight among
    these."""

    answer_share: Annotated[float, Bounds(above=0, most=1), TEXT] = 0.5
    """Share of the tokens that own answers have, where there is text besides."""

    answer_temperature: Annotated[float, Bounds(0), TEXT] = 1.0
    """Temperature at which answers are sampled; 0 takes the most likely token always, and answers
    every prompt once."""

    answer_tokens: Annotated[int, Bounds(1), TEXT] = 256
    """Largest number of tokens in an answer."""

    keep_answers: Annotated[Path | None, TEXT] = None
    """Directory for the answers, to use them in other runs too. Default: they are kept until the
    run is done."""

    tokens: Annotated[int, Bounds(1), TEXT] = 2_000_000
    """Number of tokens to train on, rounded down to whole steps; shorter text is read several
    times."""

    sequence_length: Annotated[int | None, Bounds(SHORTEST), TEXT] = None
    """Tokens per window. Default: 512, or the model's positions if these are fewer."""

    validation: Annotated[int, Bounds(1), TEXT] = 64
    """Windows for validation, which are never trained on; the checkpoint that is best on them is
    kept."""

    train: Annotated[Train, TRAINED] = Train.paired
    """Which parameters to train: those of the wide layers and of the sub-layers that share a stage
    (paired), all, or LoRA on the same."""

    rank: Annotated[int, Bounds(1), TRAINED] = 16
    """Rank of LoRA."""

    objective: Objective = field(default_factory=Objective)
    """The loss."""

    keep_predictions: Annotated[int, Bounds(0), MEMORY] = 0
    """Keep the probabilities of this many most likely tokens per position on disk, computed before
    training, instead of the original in memory. 0: the original stays in memory.

    In memory, the original's probabilities of all tokens are compared. Predictions on disk are
    computed once, even for text that is read several times."""

    learning_rate: Annotated[float, Bounds(0, 1), STEPS] = 1e-4
    """Peak learning rate."""

    schedule: Annotated[LearningRateSchedule, STEPS] = LearningRateSchedule.cosine
    """How the learning rate falls after the warm-up."""

    warmup: Annotated[float, Bounds(0, 1), STEPS] = 0.05
    """Share of the steps during which the learning rate rises."""

    batch_size: Annotated[int, Bounds(1), STEPS] = 8
    """Windows per step, on all devices together."""

    micro_batch_size: Annotated[int, Bounds(1), MEMORY] = 4
    """Windows per forward pass, on each device."""

    weight_decay: Annotated[float, Bounds(0), STEPS] = 0.0
    """Weight decay of AdamW."""

    max_grad_norm: Annotated[float, Bounds(0), STEPS] = 1.0
    """Norm to which the gradient is clipped; 0: no clipping."""

    gradient_checkpointing: Annotated[bool, MEMORY] = False
    """Recompute activations in the backward pass: less memory, more time."""

    eval_every: Annotated[int, Bounds(1), RUN] = 50
    """Steps between validations, each of which also saves the state of the run."""

    compile: Annotated[bool, RUN] = False
    """Compile the layers of both models (torch.compile): steps take less time, after some minutes
    of compiling whenever a run begins or resumes."""

    seed: int = 0
    """Random seed."""

    device: Annotated[str | None, OneOf("cpu", "cuda")] = None
    """Device to train on. Default: all GPUs, else the CPU."""

    dtype: Annotated[torch.dtype | None, OneOf("float32", "bfloat16")] = None
    """Dtype that the models compute in; trained weights and the optimizer's state are always
    float32. Default: float32 on a CPU; on a GPU that of the original, bfloat16 for float16."""

    tensorboard: Annotated[Path | None, RUN] = None
    """Directory for TensorBoard's logs."""

    def __post_init__(self) -> None:
        check_fields(self)
        length = self.sequence_length or SHORTEST
        if self.tokens < self.batch_size * length:
            raise TruedepthError(
                f"{self.tokens} tokens are less than one step of {self.batch_size} windows of"
                f" {length}."
            )
        for name in ("hidden", "on_policy"):
            if self.keep_predictions and getattr(self.objective, name):
                raise TruedepthError(
                    f"--{name.replace('_', '-')} needs the original in memory; drop"
                    " --keep-predictions."
                )

    @property
    def texts(self) -> Sequence[TextPart]:
        """The text that is read: what is given, or what stands in for it."""
        asks_text = any(part.name == FROM_TEXT for part in self.own_answers)
        if self.text or (self.own_answers and not asks_text):
            return self.text
        return (TextPart(DEFAULT_DATA),)

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, once the length of a window is known."""
        assert self.sequence_length is not None
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Number of optimizer steps, once the length of a window is known."""
        return self.tokens // self.step_tokens


class Recipe(StrEnum):
    """Named settings."""

    best = "best"
    """The defaults: of what was tried, what came nearest to the original (docs/healing.md)."""

    paper = "paper"

    @property
    def healing(self) -> Healing:
        """These settings."""
        if self is Recipe.best:
            return Healing()
        return Healing(
            objective=Objective(next_token=1.0),
            learning_rate=1e-4,
            schedule=LearningRateSchedule.linear,
            batch_size=32,
        )
