"""Speed, always as an interleaved comparison: these are ratios first and seconds after.

The paper's three tasks: prefill, generation with a KV cache, and one token with a full cache.
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
"""Tokens of a decoding run: a single one is too short to time."""


class Task(StrEnum):
    """What is timed."""

    prefill = "prefill"
    """One pass over prompts of so many tokens."""

    generate = "generate"
    """So many tokens one after another, from prompts of one token."""

    decode = "decode"
    """One token more, with so many in the KV cache."""


class Engine(StrEnum):
    """What runs the models."""

    transformers = "transformers"
    vllm = "vllm"
    llama_cpp = "llama.cpp"


@dataclass(frozen=True)
class Case:
    """A task at a size."""

    task: Task
    length: int
    batch: int = 1


@dataclass(frozen=True)
class Setup:
    """Which models an engine runs, and how."""

    model: str
    """What `load` takes; for vLLM a directory or a hub id, for llama.cpp a file."""

    against: str | None
    """The same: the base."""

    ranks: int
    """Of tensor parallelism."""

    device: str
    dtype: torch.dtype | None
    """Of weights; None for llama.cpp, where files have their own types."""

    eager: bool
    """Nothing is compiled. Otherwise vLLM compiles, and transformers on a GPU."""


@dataclass(frozen=True)
class Collectives:
    """Of one run of a case, in one rank."""

    calls: dict[str, int]
    """By kind."""

    bytes: int
    seconds: float
    """In them, waiting for the other ranks included."""

    share: float
    """Of the time of the run that was watched."""


class Runner(Protocol):
    """A model on an engine."""

    def seconds(self, case: Case) -> float:
        """One run; of decoding, a token's."""

    def collectives(self, case: Case) -> Collectives | None:
        """One more run, watched; None where the engine does not let itself be."""


@dataclass(frozen=True)
class Timing:
    """A model's runs of a case."""

    seconds: tuple[float, ...]
    """Of every run, in order."""

    collectives: Collectives | None = None

    @property
    def median(self) -> float:
        """Of the runs."""
        return median(self.seconds)


@dataclass(frozen=True)
class Row:
    """A case, measured."""

    case: Case
    model: Timing
    base: Timing | None
    """Run i of it was next to run i of the model."""

    @property
    def speedup(self) -> float | None:
        """The base's median over the model's."""
        return self.base.median / self.model.median if self.base else None

    @property
    def speedups(self) -> tuple[float, ...]:
        """Of neighbouring runs."""
        if self.base is None:
            return ()
        pairs = zip(self.base.seconds, self.model.seconds, strict=True)
        return tuple(base / model for base, model in pairs)

    @property
    def spread(self) -> tuple[float, float] | None:
        """How far neighbouring runs go below the ratio of medians, and above it."""
        if self.speedup is None:
            return None
        low, high = min(self.speedups), max(self.speedups)
        return max(0.0, self.speedup - low), max(0.0, high - self.speedup)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        ratios = {name: getattr(self, name) for name in ("speedup", "speedups", "spread")}
        return asdict(self) | ratios


def in_turn(
    runs: Sequence[Callable[[], float]], repetitions: int = REPETITIONS, warmups: int = WARMUPS
) -> list[tuple[float, ...]]:
    """What every one of them returns again and again, in turn (A B A B …).

    Args:
        runs: The machine's noise falls on all of them alike.
        repetitions: Kept, of each.
        warmups: Runs before them that are not.
    """
    rounds = [[run() for run in runs] for _ in range(warmups + repetitions)]
    return list(zip(*rounds[warmups:], strict=True))


def interleaved(
    model: Runner,
    base: Runner | None,
    cases: Sequence[Case],
    repetitions: int = REPETITIONS,
    warmups: int = WARMUPS,
) -> list[Row]:
    """Time both `in_turn`.

    Args:
        model: What is measured.
        base: What it is compared with.
        cases: One after another.
        repetitions: Timed runs of each.
        warmups: Runs before them that are not counted.
    """
    runners = [model] if base is None else [base, model]
    rows = []
    for case in cases:
        runs = [partial(runner.seconds, case) for runner in runners]
        taken = in_turn(runs, repetitions, warmups)
        *before, after = (
            Timing(seconds, runner.collectives(case))
            for runner, seconds in zip(runners, taken, strict=True)
        )
        rows.append(Row(case, after, before[0] if before else None))
    return rows
