"""Local tasks against lm-evaluation-harness run directly, and malformed files."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys

import lm_eval
import pytest
from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy import stats

import truedepth as td
from truedepth.cli import app as cli
from truedepth.evaluation.accuracy import task_scores
from truedepth.evaluation.local_tasks import known_tasks, local_tasks

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


@pytest.fixture(autouse=True)
def no_list_of_packages(monkeypatch):
    """The harness notes all packages of the environment, for a second in every run."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


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
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return results["results"][config["task"]]


ACCURACY = [
    {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
]


@pytest.mark.parametrize("num_fewshot", [0, 3])
def test_scores_are_the_harnesss(pair, task_dir, num_fewshot):
    acc, norm = task_scores(
        pair[1], ["arc_easy"], task_dir=task_dir, num_fewshot=num_fewshot, batch_size=4
    ).scores
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
    )
    assert acc.metric == "acc"
    assert acc.value == direct["acc,none"]
    assert norm.value == direct["acc_norm,none"]
    assert acc.items == 14


def answer_nothing(monkeypatch):
    """The prompts that the model is asked to score, without a model's work."""
    asked = []
    monkeypatch.setattr(
        HFLM,
        "loglikelihood",
        lambda self, requests, **_: [
            asked.append(request.args[0]) or (0.0, False) for request in requests
        ],
    )
    return asked


@pytest.mark.parametrize("num_fewshot", [5, 13])
def test_no_question_is_among_its_own_examples(pair, task_dir, num_fewshot, monkeypatch):
    asked = answer_nothing(monkeypatch)
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
    (score,) = task_scores(pair[1], ["winogrande"], task_dir=task_dir, batch_size=1).scores
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
    scores = task_scores(ours, names, against=theirs, **options).scores
    assert list(dict.fromkeys(score.task for score in scores)) == names
    alone = {(s.task, s.metric): s for s in task_scores(ours, names, **options).scores}
    original = {(s.task, s.metric): s for s in task_scores(theirs, names, **options).scores}
    for score in scores:
        assert score.items == (12 if score.task == "mmlu" else 6)
        key = score.task, score.metric
        assert score.value == alone[key].value
        assert score.against == original[key].value
        assert score.difference == pytest.approx(score.value - score.against)
    assert any(score.difference for score in scores)


def test_the_same_model_differs_by_nothing(pair, task_dir):
    options = {"task_dir": task_dir, "batch_size": 4}
    score, _ = task_scores(pair[0], ["piqa"], against=pair[0], **options).scores
    assert (score.difference, score.difference_stderr) == (0, 0)
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / 13) ** 0.5)


@pytest.fixture
def scores_of(pair, monkeypatch):
    """`scores_of(tasks, answer, …)`: task scores of what the harness answers, model by model."""

    def scores(tasks, *answers):
        manager = type("Manager", (), {"all_tasks": list(tasks), "__init__": lambda *_, **__: None})
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
        said = iter(answers)
        monkeypatch.setattr(lm_eval, "simple_evaluate", lambda *_, **__: next(said))
        against = pair[1] if len(answers) > 1 else None
        return task_scores(pair[0], tasks, against=against).scores

    return scores


def answer_of(tasks, **more):
    """What the harness answers: by task the values of its items, by metric."""
    samples = {
        task: [
            {"doc_id": n, "filter": "none", "metrics": list(metrics)}
            | dict(zip(metrics, values, strict=True))
            for n, values in enumerate(zip(*metrics.values(), strict=True))
        ]
        for task, metrics in tasks.items()
    }
    means = {
        task: {f"{metric},none": statistics.mean(values) for metric, values in metrics.items()}
        for task, metrics in tasks.items()
    }
    return {"samples": samples, "results": means, **more}


def test_the_standard_error_is_that_of_paired_differences(scores_of):
    ours, theirs = (answer_of({"piqa": {"acc": values}}) for values in ([1, 0, 1, 1], [1, 1, 0, 0]))
    (score,) = scores_of(["piqa"], ours, theirs)
    assert (score.value, score.against, score.difference) == (0.75, 0.5, 0.25)
    assert score.difference_stderr == pytest.approx(stats.sem([0, -1, 1, 1]))
    assert score.stderr == pytest.approx(stats.sem([1, 0, 1, 1]))
    assert score.kept == 1.5


def test_groups_of_the_harness_are_the_tasks_within_them(scores_of):
    subtasks = {"mmlu": ["mmlu_stem", "mmlu_other"], "mmlu_stem": ["algebra", "physics"]}
    members = {"algebra": [1, 1], "physics": [0, 0, 1], "mmlu_other": [0, 1, 1, 1], "piqa": [1, 0]}
    answer = answer_of(
        {name: {"acc": values} for name, values in members.items()},
        group_subtasks=subtasks | {"piqa": []},
    )
    mmlu, piqa = scores_of(["mmlu", "piqa"], answer)
    assert (mmlu.task, mmlu.items, mmlu.value) == ("mmlu", 2 + 3 + 4, 6 / 9)
    assert (piqa.task, piqa.items, piqa.value) == ("piqa", 2, 1 / 2)


def test_figures_that_are_no_means_of_items_are_left_out(scores_of):
    answer = answer_of({"t": {"acc": [0, 1, 0, 1], "ppl": [0.0, 1.0, 2.0, 3.0]}})
    answer["results"]["t"]["ppl,none"] = 4.48
    (score,) = scores_of(["t"], answer)
    assert (score.metric, score.items, score.value) == ("acc", 4, 0.5)


def test_mmlu_shows_the_first_examples_of_the_subject(pair, task_dir, monkeypatch):
    prompts = answer_nothing(monkeypatch)
    task_scores(pair[0], ["mmlu"], task_dir=task_dir, num_fewshot=3, batch_size=1)
    first = [item for item in read(task_dir, "mmlu_dev") if item["subject"] == "the_the"][:3]
    shown = [prompt for prompt in prompts if "about the the." in prompt]
    assert len(shown) == 7 * 4
    for prompt in shown:
        places = [prompt.index(item["question"]) for item in first]
        assert places == sorted(places)
        assert prompt.count("Answer:") == 4


def test_gsm8k_reads_the_number_after_the_marks(pair, task_dir, monkeypatch):
    items = read(task_dir, "gsm8k_test")
    answers = [f"so\n{item['answer'].split(chr(10))[1]}" for item in items]
    answers[0], answers[1] = "#### 77", items[1]["answer"].replace("#### ", "")  # wrong, unmarked
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: list(answers))
    (score,) = task_scores(pair[0], ["gsm8k"], task_dir=task_dir, batch_size=1).scores
    assert score.metric == "exact_match, strict-match"
    assert score.value == pytest.approx(12 / 14)


def test_too_few_examples(pair, task_dir):
    for name, words in [("mmlu", "mmlu_the_the has 7"), ("piqa", "piqa has 13")]:
        with pytest.raises(td.TruedepthError, match=f"{words} examples .* fewer than the 14"):
            task_scores(pair[0], [name], task_dir=task_dir, num_fewshot=14)


def test_the_original_is_opened_before_anything_is_scored(pair, task_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(td.TruedepthError, match="no-such-model"):
        task_scores(pair[0], ["piqa"], against=tmp_path / "no-such-model", task_dir=task_dir)


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
        ({"choices": "abc"}, ["line 3", "list of strings"]),
        ({"choices": []}, ["line 3", "0 choices", "at least 2"]),
        ({"query": 5}, ["line 3", "'query' must be a non-empty string"]),
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
    ("content", "words"), [("", "no items"), ("{\n", "line 1: not valid"), ("[1]\n", "not a JSON")]
)
def test_malformed_files(tmp_path, content, words):
    (tmp_path / "piqa.jsonl").write_text(content)
    with pytest.raises(td.TruedepthError, match=words):
        local_tasks(tmp_path, ["piqa"])


def test_what_is_not_there(tmp_path, pair):
    with pytest.raises(td.TruedepthError, match=r"Cannot read the task file .*piqa\.jsonl"):
        local_tasks(tmp_path, ["piqa"])
    with pytest.raises(
        td.TruedepthError, match="'chess' is not a local task; choose from arc_easy"
    ):
        local_tasks(tmp_path, ["chess"])
    with pytest.raises(td.TruedepthError, match="no directory of tasks"):
        local_tasks(tmp_path / "none", ["piqa"])
    with pytest.raises(td.TruedepthError, match="'no_such_task' is not a task of lm-eval"):
        task_scores(pair[0], ["no_such_task"], batch_size=4)


def test_the_command(make_model, task_dir, tmp_path, monkeypatch, capsys):
    arguments = ["eval", make_model(), "--tasks", "piqa,winogrande", "--task-dir", task_dir]
    arguments += ["--against", make_model(num_key_value_heads=4), "--limit", 5, "--batch-size", 4]
    arguments += ["--json", tmp_path / "scores.json"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["truedepth", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    out, log = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80
    assert "\r" not in log  # no bars where nobody watches
    for words in ("original", "piqa", "acc_norm", "winogrande", "average", "kept"):
        assert words in out
    data = json.loads((tmp_path / "scores.json").read_text())
    assert [row["items"] for row in data["scores"]] == [5, 5, 5]
    assert data["model"] != data["against"]
    assert (data["limit"], data["seed"], data["dtype"]) == (5, 1234, "float32")
    assert data["versions"]["lm_eval"]


def test_no_line_of_git_or_the_harness_in_the_log(make_model, task_dir, tmp_path):
    command = [sys.executable, "-m", "truedepth", "eval", make_model(), "--tasks", "piqa"]
    command += ["--task-dir", task_dir, "--limit", "3"]
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith("model")
