"""Accuracy of a model and its original on benchmarks, through lm-evaluation-harness."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers

from truedepth.errors import TruedepthError, reason_of
from truedepth.evaluation.harness import as_the_harness_needs, harness_model
from truedepth.evaluation.local_tasks import local_tasks
from truedepth.evaluation.scores import Scores, TaskScore, mean, task_score
from truedepth.files.descriptors import quiet
from truedepth.options import Bounds, checked
from truedepth.progress import note
from truedepth.runtime.loading import Loaded, load, opened, source_of
from truedepth.sources.source import Source
from truedepth.tensors import dtype_name
from truedepth.version import __version__

CPU_BATCH_SIZE = 8

FEWSHOT_SEED = 1234
"""The harness's default, so that scores are comparable with published ones."""

Results = dict[tuple[str, str], Scores]
"""Item scores by task and metric."""


@dataclass(frozen=True)
class Accuracy:
    """Scores on benchmarks, and the settings they were measured with."""

    model: str
    """The model's name and where it was found."""

    against: str | None
    """The original's name and where it was found."""

    scores: list[TaskScore]
    num_fewshot: int | None
    """Examples per question; None for each task's own number."""

    limit: int | None
    """Most items per task or subtask; None for all."""

    chat: bool
    """Whether requests went through the chat template."""

    seed: int
    dtype: str
    versions: dict[str, str]
    """Versions of the packages that the scores depend on."""

    def to_dict(self) -> dict[str, Any]:
        """All scores and settings as JSON-compatible data."""
        return asdict(self) | {"scores": [score.to_dict() for score in self.scores]}


@checked
def task_scores(
    model: str | Path | Source | Loaded,
    tasks: Sequence[str],
    *,
    against: str | Path | Source | Loaded | None = None,
    task_dir: str | Path | None = None,
    num_fewshot: Annotated[int | None, Bounds(0)] = None,
    limit: Annotated[int | None, Bounds(1)] = None,
    chat: bool = False,
    run_code: bool = False,
    batch_size: Annotated[int | str, Bounds(1)] = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    seed: int = FEWSHOT_SEED,
) -> Accuracy:
    """Score a model on benchmarks, and its original on the same items.

    Both are opened before anything is scored; only one at a time is in memory.

    Args:
        model: The model to score: anything that `load` takes, or a `Loaded`.
        tasks: With `task_dir`, names of local tasks; else names of the harness's own tasks, whose
            data come from the hub.
        against: The original; default: the model is scored alone.
        task_dir: Directory of JSONL files.
        num_fewshot: Examples before every question; default: each task's own number.
        limit: Most items per task, or per subtask if a task has several; default: all.
        chat: Ask through the chat template, with every example as a question and an answer.
        run_code: Run the code that models write for tasks such as humaneval, on this machine.
        batch_size: A number, or `auto`: 8 on a CPU, the largest that fits on a GPU.
        device: Device of the models, unless they are loaded already.
        dtype: Dtype of the models, unless they are loaded already.
        seed: Random seed for choosing examples.

    Raises:
        TruedepthError: A task is unknown, its file is malformed, a tokenizer has no chat template,
            lm-eval is not installed, or it fails.
    """
    try:
        import lm_eval
    except ImportError as error:
        way = "pip install 'truedepth[report]'"
        raise TruedepthError(f"Tasks need lm-evaluation-harness: {way}.") from error
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=task_dir is None)
    configs: Mapping[str, Sequence[Any]] = (
        _harness_tasks(manager, tasks)
        if task_dir is None
        else local_tasks(task_dir, tasks, num_fewshot)
    )
    run = _Run(configs, manager, num_fewshot, limit, chat, run_code, batch_size, seed)
    models = [opened(each) for each in (model, against) if each is not None]
    if chat:
        _check_templates(map(source_of, models))
    results = []
    for each in models:
        loaded = load(each, device=device, dtype=dtype)
        results.append((dtype_name(loaded.model.dtype), run.scores(loaded)))
        del loaded  # frees its memory before the next one is loaded
    theirs: Results = results[1][1] if against is not None else {}
    return Accuracy(
        model=source_of(models[0]).label,
        against=source_of(models[1]).label if len(models) > 1 else None,
        scores=[
            task_score(task, metric, scores, theirs.get((task, metric)))
            for (task, metric), scores in results[0][1].items()
        ],
        num_fewshot=num_fewshot,
        limit=limit,
        chat=chat,
        seed=seed,
        dtype=results[0][0],
        versions={
            "truedepth": __version__,
            "lm_eval": lm_eval.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    )


def _check_templates(sources: Iterable[Source]) -> None:
    for source in sources:
        if not source.tokenizer.chat_template:
            raise TruedepthError(f"The tokenizer of {source.name} has no chat template for --chat.")


def _harness_tasks(manager: Any, tasks: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """The harness's own tasks as `_Run.configs`; refuses names that it does not know."""
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise TruedepthError(
            f"{unknown[0]!r} is not a task of lm-evaluation-harness; for tasks in your own"
            " files give --task-dir."
        )
    return {name: [name] for name in tasks}


@dataclass(frozen=True)
class _Run:
    """Settings for running the harness, the same for each model."""

    configs: Mapping[str, Sequence[Any]]
    """For each task the harness config or name, or those of its subtasks."""

    manager: Any
    num_fewshot: int | None
    limit: int | None
    chat: bool
    run_code: bool
    batch_size: int | str
    seed: int

    def scores(self, loaded: Loaded) -> Results:
        """Score all items of a model, by task and metric."""
        results = self._ask(loaded)
        subtasks = results.get("group_subtasks", {})
        found: Results = {}
        for task, configs in self.configs.items():
            names = [c["task"] if isinstance(c, dict) else c for c in configs]
            members = list(_leaves(names, subtasks))
            metrics = [_item_scores(results, member) for member in members]
            for metric in metrics[0] if metrics else ():
                if all(metric in each for each in metrics):
                    found[task, metric] = {
                        (member, number): value
                        for member, each in zip(members, metrics, strict=True)
                        for number, value in each[metric].items()
                    }
        if not found:
            raise TruedepthError(
                f"{', '.join(self.configs)} gave no scores of single items; give names of tasks,"
                " not of tags."
            )
        return found

    def _ask(self, loaded: Loaded) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        batch_size = self.batch_size
        if batch_size == "auto" and loaded.model.device.type == "cpu":
            batch_size = CPU_BATCH_SIZE  # the harness would first try 64 of the longest length
        tasks = [config for configs in self.configs.values() for config in configs]
        if self.run_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric asks for, besides
        try:
            with quiet(), as_the_harness_needs(loaded):
                harness = harness_model(loaded, batch_size)
                results: dict[str, Any] = simple_evaluate(
                    harness,
                    tasks=[dict(task) if isinstance(task, dict) else task for task in tasks],
                    task_manager=self.manager,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    apply_chat_template=self.chat,
                    fewshot_as_multiturn=self.chat,
                    confirm_run_unsafe_code=self.run_code,
                    log_samples=True,
                    bootstrap_iters=0,
                    random_seed=self.seed,
                    numpy_random_seed=self.seed,
                    torch_random_seed=self.seed,
                    fewshot_random_seed=self.seed,
                )
        except TruedepthError:
            raise
        except Exception as error:  # tasks run code of their own
            if "marked as unsafe" in str(error) and not self.run_code:
                raise TruedepthError(
                    f"{', '.join(self.configs)}: a task runs the code that models write on this"
                    " machine; allow it with --run-code (run_code=True in Python)."
                ) from error
            if isinstance(error, ModuleNotFoundError):
                raise TruedepthError(
                    f"{', '.join(self.configs)}: a task needs the package {error.name}; pip install"
                    f" {error.name}, or what lm-evaluation-harness names for the task, such as"
                    " 'lm-eval[ifeval]'."
                ) from error
            raise TruedepthError(
                f"lm-evaluation-harness cannot run {', '.join(self.configs)}: {reason_of(error)}"
            ) from error
        if harness.cut:
            note(
                f"{harness.cut} requests were longer than the {harness.max_length} positions of"
                f" {loaded.source.name}; lm-evaluation-harness left out their beginnings."
            )
        return results


def _item_scores(results: Mapping[str, Any], task: str) -> dict[str, dict[int, float]]:
    """A task's item scores by metric, for metrics that the harness reports as their plain mean."""
    by_metric: dict[tuple[str, str], dict[int, float]] = {}
    for item in results["samples"].get(task, ()):
        for metric in item["metrics"]:
            if isinstance(item[metric], bool | int | float):
                scores = by_metric.setdefault((metric, item["filter"]), {})
                scores[item["doc_id"]] = float(item[metric])
    found = {}
    for (metric, kind), scores in by_metric.items():
        figure = results["results"][task].get(f"{metric},{kind}")
        if isinstance(figure, int | float) and math.isclose(
            figure, mean(list(scores.values())), abs_tol=1e-9
        ):
            found[metric if kind == "none" else f"{metric}, {kind}"] = scores
    return found


def _leaves(names: Sequence[str], subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Replace groups of tasks, such as the harness's own mmlu, by the tasks that they contain."""
    for name in names:
        if subtasks.get(name):
            yield from _leaves(subtasks[name], subtasks)
        else:
            yield name
