"""Times models in turn (A B A B …), so that their ratio is reliable even on a noisy machine.

There are three tasks, as in the paper (arXiv 2502.02790): prefill, generation with a KV cache, and
one token with a full cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

REPETITIONS, WARMUPS = 5, 2

DECODED = 16
"""Tokens per run of `decode`: a single token is too short to time."""


class Task(StrEnum):
    """What is timed; `n` is the case's length."""

    prefill = "prefill"
    """One forward pass over a prompt of `n` tokens."""

    generate = "generate"
    """`n` tokens generated one after another, from a prompt of one token."""

    decode = "decode"
    """One more token, with `n` tokens in the KV cache."""


class Engine(StrEnum):
    """The engine that runs the models."""

    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama.cpp"


@dataclass(frozen=True)
class Case:
    """A task with its size."""

    task: Task
    length: int
    """Number of tokens; see `Task`."""

    batch: int = 1
    """Number of sequences that run at a time."""

    @property
    def rows(self) -> int:
        """Number of tokens that one pass computes: prompts, or one token of every sequence."""
        return self.batch * (self.length if self.task is Task.prefill else 1)


@dataclass(frozen=True)
class Setup:
    """The models that an engine runs, and how it runs them."""

    model: str
    """What `load` takes; for vLLM a directory or a hub id, for llama.cpp a GGUF file."""

    against: str | None
    """The base, likewise; None: the model is timed alone."""

    ranks: int
    """Tensor-parallel size."""

    device: str
    dtype: torch.dtype | None
    """Dtype of the weights; None for llama.cpp, where files have their own types."""

    eager: bool
    """Whether nothing is compiled. If False, vLLM compiles, and so does transformers on a GPU."""

    fuse: bool = False
    """Whether the stages of both models are fused in transformers (`truedepth.fuse`)."""


@dataclass(frozen=True)
class Collectives:
    """The collectives of one rank in one run of a case; for `decode`, per token."""

    calls: dict[str, int]
    """Number of calls by kind."""

    bytes: int
    """Bytes that the rank passed to them."""

    seconds: float
    """Seconds spent in them, including waiting for other ranks."""

    share: float
    """Share of the time of the watched run that was spent in them."""


class TimedModel(Protocol):
    """A model loaded in an engine, ready to be timed."""

    def seconds(self, case: Case) -> float:
        """Seconds of one run; for `decode`, per token."""

    def collectives(self, case: Case) -> Collectives | None:
        """The collectives of one more run; None if there are none or they cannot be watched."""


@dataclass(frozen=True)
class Timing:
    """A model's runs of a case."""

    seconds: tuple[float, ...]
    """Seconds of every run, in order; for `decode`, per token."""

    collectives: Collectives | None = None

    @property
    def median(self) -> float:
        """Median of the runs, in seconds."""
        return median(self.seconds)


@dataclass(frozen=True)
class Row:
    """The timings of one case."""

    case: Case
    model: Timing
    base: Timing | None
    """The base's runs; its run i came just before the model's run i. None without a base."""

    @property
    def speedup(self) -> float | None:
        """The base's median divided by the model's; None without a base."""
        return self.base.median / self.model.median if self.base else None

    @property
    def speedups(self) -> tuple[float, ...]:
        """Speed-ups of neighbouring runs; empty without a base."""
        if self.base is None:
            return ()
        pairs = zip(self.base.seconds, self.model.seconds, strict=True)
        return tuple(base / model for base, model in pairs)

    @property
    def spread(self) -> tuple[float, float] | None:
        """How far the speed-ups of neighbouring runs fall below and rise above `speedup`."""
        if self.speedup is None:
            return None
        low, high = min(self.speedups), max(self.speedups)
        return max(0.0, self.speedup - low), max(0.0, high - self.speedup)

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON-compatible data."""
        ratios = {name: getattr(self, name) for name in ("speedup", "speedups", "spread")}
        return asdict(self) | ratios


def in_turn(
    runs: Sequence[Callable[[], float]], repetitions: int = REPETITIONS, warmups: int = WARMUPS
) -> list[tuple[float, ...]]:
    """Call functions in turn (A B A B …), so that the machine's noise affects all of them alike.

    Args:
        runs: Functions that do one run and return its seconds.
        repetitions: Number of results of each function that are kept.
        warmups: Number of calls of each function before these, whose results are dropped.

    Returns:
        For each function its results, in order.
    """
    rounds = [[run() for run in runs] for _ in range(warmups + repetitions)]
    return list(zip(*rounds[warmups:], strict=True))


def interleaved(
    model: TimedModel,
    base: TimedModel | None,
    cases: Sequence[Case],
    repetitions: int = REPETITIONS,
    warmups: int = WARMUPS,
) -> list[Row]:
    """Time a model and its base `in_turn`, one case after another.

    Args:
        model: The model.
        base: The model to compare with, or None.
        cases: Cases to time.
        repetitions: Timed runs of each model and case.
        warmups: Runs before these that are not counted.

    Returns:
        One row per case.
    """
    models = [model] if base is None else [base, model]
    rows = []
    for case in cases:
        runs = [partial(each.seconds, case) for each in models]
        taken = in_turn(runs, repetitions, warmups)
        *before, after = (
            Timing(seconds, each.collectives(case))
            for each, seconds in zip(models, taken, strict=True)
        )
        rows.append(Row(case, after, before[0] if before else None))
    return rows
