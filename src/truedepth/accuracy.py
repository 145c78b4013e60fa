"""Accuracy on benchmarks through lm-evaluation-harness, of a model and of its original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from truedepth.errors import TruedepthError
from truedepth.loading import Loaded, load
from truedepth.local_tasks import local_tasks
from truedepth.sources import Source

CPU_BATCH_SIZE = 8

Scores = dict[tuple[str, int], float]
"""Of single items, by subtask and number."""

Results = dict[tuple[str, str], Scores]
"""By task and metric."""


@dataclass(frozen=True)
class TaskScore:
    """A model's score on one task by one metric, and with an original the difference to it."""

    task: str
    metric: str
    items: int
    value: float
    """Mean over items."""

    stderr: float | None
    """Of the mean; None for a single item."""

    against: float | None = None
    """The original's score on the same items."""

    difference: float | None = None
    """`value - against`."""

    difference_stderr: float | None = None
    """Paired over items: both models answer the same ones."""

    @property
    def kept(self) -> float | None:
        """Share of the original's score that is kept."""
        return self.value / self.against if self.against else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"kept": self.kept}


def task_scores(
    model: str | Path | Source | Loaded,
    tasks: Sequence[str],
    *,
    against: str | Path | Source | Loaded | None = None,
    task_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[TaskScore]:
    """Score a model on benchmarks.

    Args:
        model: What to score; anything that `load` takes, or what it gave.
        tasks: Names of local tasks where `task_dir` is given, else of the harness's own, whose data
            come from the hub.
        against: The original, on the same items.
        task_dir: Directory of JSONL files.
        num_fewshot: Examples before every question; by default the task's own number.
        limit: Items a task (a subtask, where it is made of several) at most.
        batch_size: A number, or `auto`: the largest that fits on a GPU, 8 on a CPU.
        device: For models that are not loaded yet.
        dtype: Likewise.
        seed: Of the choice of examples.

    Raises:
        TruedepthError: A task is unknown or its file malformed, or lm-eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise TruedepthError(
            "Tasks need lm-evaluation-harness: pip install 'truedepth[report]'."
        ) from error
    configs = {name: [name] for name in tasks} if task_dir is None else local_tasks(task_dir, tasks)
    run = _Run(configs, task_dir is None, num_fewshot, limit, batch_size, seed)
    loaded = load(model, device=device, dtype=dtype)
    ours = run.scores(loaded)
    theirs: Results = {}
    if against is not None:
        theirs = run.scores(load(against, device=device, dtype=dtype))
    return [
        _compare(task, metric, scores, theirs.get((task, metric)))
        for (task, metric), scores in ours.items()
    ]


@dataclass(frozen=True)
class _Run:
    """One way of asking the harness, for each of the models."""

    configs: Mapping[str, Sequence[Any]]
    """By task its harness config or name, or those of its subtasks."""

    harness_tasks: bool
    """Whether the harness's own tasks are needed, whose index takes seconds to build."""

    num_fewshot: int | None
    limit: int | None
    batch_size: int | str
    seed: int

    def scores(self, loaded: Loaded) -> Results:
        """The scores of all items, by task and metric."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        batch_size = self.batch_size
        if batch_size == "auto" and loaded.model.device.type == "cpu":
            batch_size = CPU_BATCH_SIZE  # the harness would try 64 of the longest request
        tasks = [config for configs in self.configs.values() for config in configs]
        try:
            results = simple_evaluate(
                HFLM(
                    pretrained=loaded.model,
                    tokenizer=loaded.tokenizer,
                    batch_size=batch_size,
                ),
                tasks=[dict(task) if isinstance(task, dict) else task for task in tasks],
                task_manager=TaskManager(include_defaults=self.harness_tasks),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
            )
        except (KeyError, ValueError, OSError, AssertionError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise TruedepthError(
                f"lm-evaluation-harness cannot run {', '.join(self.configs)}: {reason}."
            ) from error
        subtasks = results.get("group_subtasks", {})
        found: Results = {}
        for task, configs in self.configs.items():
            members = [c["task"] if isinstance(c, dict) else c for c in configs]
            for member in _leaves(members, subtasks):
                for item in results["samples"].get(member, ()):
                    for metric in item["metrics"]:
                        if not isinstance(item[metric], bool | int | float):
                            continue  # of whole corpora, not of items: nothing to pair
                        plain = item["filter"] == "none"
                        name = metric if plain else f"{metric}, {item['filter']}"
                        scores = found.setdefault((task, name), {})
                        scores[member, item["doc_id"]] = float(item[metric])
        if not found:
            raise TruedepthError(
                f"{', '.join(self.configs)} gave no scores of single items; name tasks, not tags."
            )
        return found


def _leaves(names: Sequence[str], subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Tasks without subtasks, in the place of groups such as the harness's own mmlu."""
    for name in names:
        if subtasks.get(name):
            yield from _leaves(subtasks[name], subtasks)
        else:
            yield name


def _compare(task: str, metric: str, ours: Scores, theirs: Scores | None) -> TaskScore:
    values = list(ours.values())
    plain = TaskScore(task, metric, len(values), _mean(values), _stderr(values))
    if theirs is None:
        return plain
    differences = [value - theirs[item] for item, value in ours.items()]
    return TaskScore(
        **asdict(plain)
        | {
            "against": _mean([theirs[item] for item in ours]),
            "difference": _mean(differences),
            "difference_stderr": _stderr(differences),
        }
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
