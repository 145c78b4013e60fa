"""Local tasks against lm-evaluation-harness run directly, and malformed files."""

from __future__ import annotations

import json
import random
import statistics
import sys

import pytest
from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

import truedepth as td
from truedepth import cli
from truedepth.accuracy import task_scores
from truedepth.local_tasks import known_tasks, local_tasks

WORDS = ["the", "cat", "sat", "on", "mat", "and", "then", "hat"]


def sentence(generator, length=4):
    return " ".join(generator.choice(WORDS) for _ in range(length))


def make_items(name, count, seed):
    generator = random.Random(f"{name} {seed}")

    def choices(n):
        return [sentence(generator) for _ in range(n)]

    for number in range(count):
        if name == "winogrande":
            gold = generator.randrange(2)
            yield {"contexts": choices(2), "continuation": sentence(generator), "gold": gold}
        elif name == "mmlu":
            item = {"subject": f"the_{WORDS[number % 2]}", "question": sentence(generator)}
            yield item | {"choices": choices(4), "gold": generator.randrange(4)}
        elif name == "gsm8k":
            answer = f"{sentence(generator)}\n#### {generator.randrange(9)}"
            yield {"question": sentence(generator), "answer": answer}
        else:
            item = {"query": sentence(generator), "choices": choices(4)}
            yield item | {"gold": generator.randrange(4)}


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    for name, task in known_tasks().items():
        for split, file in task["files"].items():
            items = make_items(name, 14, split)
            (directory / file).write_text("".join(json.dumps(item) + "\n" for item in items))
    return directory


def read(task_dir, name):
    return [json.loads(line) for line in (task_dir / f"{name}.jsonl").read_text().splitlines()]


def run_directly(loaded, config, items, **options):
    """The harness with a task written here, on the same items."""
    data = DatasetDict({"test": Dataset.from_list(items)})
    results = simple_evaluate(
        HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4),
        tasks=[config | {"test_split": "test", "custom_dataset": lambda **_: data}],
        bootstrap_iters=0,
        **options,
    )
    return results["results"][config["task"]]


ACCURACY = [
    {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
]


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_scores_are_the_harnesss(pair, task_dir, num_fewshot):
    (acc, norm) = task_scores(
        pair[1], ["arc_easy"], task_dir=task_dir, num_fewshot=num_fewshot, batch_size=4, seed=7
    )
    config = {
        "task": "mine",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "fewshot_split": "test",
        "metric_list": ACCURACY,
    }
    direct = run_directly(
        pair[1],
        config,
        read(task_dir, "arc_easy"),
        num_fewshot=num_fewshot,
        fewshot_random_seed=7,
    )
    assert acc.metric == "acc"
    assert acc.value == direct["acc,none"]
    assert norm.value == direct["acc_norm,none"]
    assert acc.items == 14


@pytest.mark.parametrize("num_fewshot", [5, 13])
def test_no_question_is_among_its_own_examples(pair, task_dir, num_fewshot, monkeypatch):
    asked = []
    monkeypatch.setattr(
        HFLM,
        "loglikelihood",
        lambda self, requests, **_: [
            asked.append(request.args[0]) or (0.0, False) for request in requests
        ],
    )
    options = {"num_fewshot": num_fewshot, "batch_size": 1}
    task_scores(pair[0], ["piqa"], task_dir=task_dir, **options)
    queries = {item["query"] for item in read(task_dir, "piqa")}
    assert len(queries) == 14
    for prompt in asked:
        *examples, question = prompt.split("\n\n")
        assert len(examples) == num_fewshot
        assert question in queries
        assert not [example for example in examples if example.startswith(f"{question} ")]


def test_winogrande_scores_one_continuation_after_two_contexts(pair, task_dir):
    """By hand: the context after which the continuation is likelier."""
    (score,) = task_scores(pair[1], ["winogrande"], task_dir=task_dir, batch_size=1)
    right = []
    for item in read(task_dir, "winogrande"):
        ids = [pair[1].tokenizer(f"{c} {item['continuation']}").input_ids for c in item["contexts"]]
        starts = [len(pair[1].tokenizer(c).input_ids) for c in item["contexts"]]
        logps = []
        for tokens, start in zip(ids, starts, strict=True):
            import torch

            logp = pair[1].model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            logps.append(sum(logp[i - 1, tokens[i]].item() for i in range(start, len(tokens))))
        right.append(float((logps[1] > logps[0]) == bool(item["gold"])))
    assert score.value == statistics.mean(right)


def test_mmlu_takes_its_examples_from_the_same_subject(task_dir):
    configs = local_tasks(task_dir, ["mmlu"])["mmlu"]
    assert [config["task"] for config in configs] == ["mmlu_the_the", "mmlu_the_cat"]
    for config, subject in zip(configs, ("the the", "the cat"), strict=True):
        assert f"about {subject}." in config["description"]
        data = config["custom_dataset"]()
        for split in ("dev", "test"):
            assert len(data[split]) == 7
            assert {item["subject"] for item in data[split]} == {subject.replace(" ", "_")}


def test_all_tasks_run_and_differences_are_paired(pair, task_dir):
    ours, theirs = pair
    names = list(known_tasks())
    options = {"task_dir": task_dir, "num_fewshot": 1, "limit": 6, "batch_size": 4}
    scores = task_scores(ours, names, against=theirs, **options)
    assert list(dict.fromkeys(score.task for score in scores)) == names
    alone = {(s.task, s.metric): s for s in task_scores(ours, names, **options)}
    original = {(s.task, s.metric): s for s in task_scores(theirs, names, **options)}
    for score in scores:
        assert score.items == (12 if score.task == "mmlu" else 6)
        key = score.task, score.metric
        assert score.value == alone[key].value
        assert score.against == original[key].value
        assert score.difference == pytest.approx(score.value - score.against)
    assert any(score.difference for score in scores)


def test_the_same_model_differs_by_nothing(pair, task_dir):
    options = {"task_dir": task_dir, "batch_size": 4}
    (score, _) = task_scores(pair[0], ["piqa"], against=pair[0], **options)
    assert (score.difference, score.difference_stderr) == (0, 0)
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 13) ** 0.5)


def break_line(path, number, **changes):
    lines = path.read_text().splitlines()
    item = json.loads(lines[number - 1]) | changes
    lines[number - 1] = json.dumps({k: v for k, v in item.items() if v is not None})
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gold": None}, ["piqa.jsonl", "line 3", "'gold'"]),
        ({"gold": 4}, ["line 3", "0 to 3", "not 4"]),
        ({"gold": "1"}, ["line 3", "'1'"]),
        ({"choices": "abc"}, ["line 3", "list of texts"]),
        ({"choices": []}, ["line 3", "0 choices", "at least 2"]),
        ({"query": 5}, ["line 3", "'query' must be a text"]),
    ],
)
def test_malformed_items(tmp_path, task_dir, change, words):
    (tmp_path / "piqa.jsonl").write_text((task_dir / "piqa.jsonl").read_text())
    break_line(tmp_path / "piqa.jsonl", 3, **change)
    with pytest.raises(td.TruedepthError) as caught:
        local_tasks(tmp_path, ["piqa"])
    for word in words:
        assert word in str(caught.value)


def test_winogrande_needs_two_contexts(tmp_path, task_dir):
    (tmp_path / "winogrande.jsonl").write_text((task_dir / "winogrande.jsonl").read_text())
    break_line(tmp_path / "winogrande.jsonl", 2, contexts=["a", "b", "c"])
    with pytest.raises(td.TruedepthError, match="line 2: 3 choices, where 2 are needed"):
        local_tasks(tmp_path, ["winogrande"])


@pytest.mark.parametrize(
    ("content", "words"), [("", "empty"), ("{\n", "line 1: not valid"), ("[1]\n", "not a JSON")]
)
def test_malformed_files(tmp_path, content, words):
    (tmp_path / "piqa.jsonl").write_text(content)
    with pytest.raises(td.TruedepthError, match=words):
        local_tasks(tmp_path, ["piqa"])


def test_what_is_not_there(tmp_path, pair):
    with pytest.raises(td.TruedepthError, match=r"Cannot read the task file .*piqa\.jsonl"):
        local_tasks(tmp_path, ["piqa"])
    with pytest.raises(td.TruedepthError, match="'chess' is not a local task; there are arc_easy"):
        local_tasks(tmp_path, ["chess"])
    with pytest.raises(td.TruedepthError, match="no directory of tasks"):
        local_tasks(tmp_path / "none", ["piqa"])
    with pytest.raises(td.TruedepthError, match="cannot run no_such_task"):
        task_scores(pair[0], ["no_such_task"], batch_size=4)


def test_the_command(make_model, task_dir, tmp_path, monkeypatch, capsys):
    arguments = ["eval", make_model(), "--tasks", "piqa,winogrande", "--task-dir", task_dir]
    arguments += ["--against", make_model(num_key_value_heads=4), "--limit", 5, "--batch-size", 4]
    arguments += ["--json", tmp_path / "scores.json"]
    monkeypatch.setattr(sys, "argv", ["truedepth", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for words in ("piqa", "acc_norm", "winogrande", "average", "kept"):
        assert words in out
    data = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert [row["items"] for row in data] == [5, 5, 5]
