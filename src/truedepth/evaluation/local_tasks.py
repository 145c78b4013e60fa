"""The paper's benchmarks from plain JSONL files, as tasks of lm-evaluation-harness.

`tasks.yaml` describes each task. This module reads and checks its items, so that an error names the
malformed file, line and key instead of coming from within the harness.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from truedepth.errors import TruedepthError
from truedepth.text import check_characters, read_lines

Item = dict[str, Any]


def known_tasks() -> dict[str, dict[str, Any]]:
    """Read the descriptions of all local tasks, by name."""
    text = files("truedepth.evaluation").joinpath("tasks.yaml").read_text(encoding="utf-8")
    tasks: dict[str, dict[str, Any]] = yaml.safe_load(text)["tasks"]
    return tasks


def local_tasks(
    directory: str | Path, names: Sequence[str], num_fewshot: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Read tasks from a directory, as configs of lm-evaluation-harness.

    Args:
        directory: Directory of the JSONL files.
        names: Names of the tasks.
        num_fewshot: Examples per question; default: each task's own number.

    Returns:
        For each name the configs of the task: one, or one for each subtask.

    Raises:
        TruedepthError: A name is unknown, a file is missing or malformed (the error names line and
            key), or there are fewer examples than `num_fewshot`.
    """
    directory, known = Path(directory).expanduser(), known_tasks()
    if not directory.is_dir():
        raise TruedepthError(f"There is no directory of tasks at {directory}.")
    found = {}
    for name in names:
        if name not in known:
            raise TruedepthError(f"{name!r} is not a local task; choose from {', '.join(known)}.")
        task = known[name]
        splits = {
            split: _read(directory / file, task["keys"], task.get("options"))
            for split, file in task["files"].items()
        }
        found[name] = _configs(name, task, splits, num_fewshot)
    return found


def _configs(
    name: str, task: dict[str, Any], splits: dict[str, list[Item]], num_fewshot: int | None
) -> list[dict[str, Any]]:
    per = task.get("per")
    values = dict.fromkeys(item[per] for item in splits["test"]) if per else [None]
    configs = []
    for value in values:
        part = {
            split: [item for item in items if per is None or item[per] == value]
            for split, items in splits.items()
        }
        config = {**task["config"], "task": name}
        if value is not None:
            config["task"] = f"{name}_{value}"
            config["description"] = config["description"].format(per=value.replace("_", " "))
        if num_fewshot is not None:
            config["num_fewshot"] = num_fewshot
        _check_examples(config, part)
        configs.append({**config, "custom_dataset": _dataset(part)})
    return configs


def _check_examples(config: dict[str, Any], splits: dict[str, list[Item]]) -> None:
    """Check that there are enough examples; a question is never among its own."""
    split, shots = config["fewshot_split"], config.get("num_fewshot", 0)
    there = len(splits[split]) - (split == config["test_split"])
    if there < shots:
        raise TruedepthError(
            f"{config['task']} has {there} examples per question, fewer than the {shots} needed;"
            " lower --num-fewshot."
        )


def _dataset(splits: dict[str, list[Item]]) -> Callable[..., Any]:
    """Make the function that the harness calls to get a task's data."""

    def make(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(items) for split, items in splits.items()})

    return make


def _read(path: Path, keys: Sequence[str], exactly: int | None) -> list[Item]:
    items = [
        _item(line, path, number, keys, exactly)
        for number, line in read_lines(path, "the task file")
    ]
    if not items:
        raise TruedepthError(f"{path} contains no items; write one JSON object per line.")
    return items


def _item(line: str, path: Path, number: int, keys: Sequence[str], exactly: int | None) -> Item:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TruedepthError(f"{path}, line {number}: not valid JSON.") from error
    if not isinstance(item, dict):
        raise TruedepthError(f"{path}, line {number}: not a JSON object.")
    for key in keys:
        if key not in item:
            raise TruedepthError(f"{path}, line {number}: lacks the key {key!r}.")
    for key in set(keys) - {"choices", "contexts", "gold"}:
        if not isinstance(item[key], str) or not item[key].strip():
            raise TruedepthError(f"{path}, line {number}: {key!r} must be a non-empty string.")
    options = item.get("choices", item.get("contexts"))
    if "gold" in keys:
        if not isinstance(options, list) or not all(isinstance(each, str) for each in options):
            raise TruedepthError(f"{path}, line {number}: the choices must be a list of strings.")
        if len(options) < 2 or exactly not in (None, len(options)):
            raise TruedepthError(
                f"{path}, line {number}: {len(options)} choices, where"
                f" {exactly or 'at least 2'} are needed."
            )
        if type(item["gold"]) is not int or not 0 <= item["gold"] < len(options):
            raise TruedepthError(
                f"{path}, line {number}: 'gold' must be an integer from 0 to {len(options) - 1},"
                f" not {item['gold']!r}."
            )
    item = {key: item[key] for key in keys}
    check_characters(json.dumps(item, ensure_ascii=False), f"{path}, line {number}")
    return item
