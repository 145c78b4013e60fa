"""Scores on items, alone or paired with another model's on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

Scores = dict[tuple[str, int], float]
"""Scores of single items, by subtask and item number."""


@dataclass(frozen=True)
class TaskScore:
    """A model's score on one task by one metric, and its difference from the original's score."""

    task: str
    metric: str
    items: int
    value: float
    """Mean over the items."""

    stderr: float | None
    """Standard error of the mean; None for a single item."""

    against: float | None = None
    """The original's score on the same items; None without an original."""

    difference: float | None = None
    """`value - against`."""

    difference_stderr: float | None = None
    """Standard error of the difference, paired over items: both models answer the same ones."""

    @property
    def kept(self) -> float | None:
        """Share of the original's score that the model keeps: `value / against`."""
        return self.value / self.against if self.against else None

    def to_dict(self) -> dict[str, Any]:
        """The score as JSON-compatible data."""
        return asdict(self) | {"kept": self.kept}


def task_score(task: str, metric: str, ours: Scores, theirs: Scores | None = None) -> TaskScore:
    """A model's score on items, and how far it is from the original's on the same ones.

    Args:
        task: What is asked.
        metric: How an answer is scored.
        ours: The model's scores.
        theirs: The original's.
    """
    values = list(ours.values())
    plain = TaskScore(task, metric, len(values), mean(values), stderr(values))
    if theirs is None:
        return plain
    differences = [value - theirs[item] for item, value in ours.items()]
    return TaskScore(
        **asdict(plain)
        | {
            "against": mean([theirs[item] for item in ours]),
            "difference": mean(differences),
            "difference_stderr": stderr(differences),
        }
    )


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def stderr(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for a single value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))
