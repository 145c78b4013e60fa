"""Models and tokenizers as lm-evaluation-harness meets them."""

from __future__ import annotations

import json
import os
import shutil

import lm_eval.evaluator
import pytest

import truedepth as td
from tiny_models import byte_tokenizer
from truedepth import progress
from truedepth.evaluation.accuracy import task_scores

QUESTIONS = ["the cat sat on the", "a cat and then", "the hat", "then the mat"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The harness notes all packages of the environment, for a second in every run."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(progress, "_noted", set())


@pytest.fixture
def tasks(tmp_path):
    """Writes tasks with such questions; gives their directory."""

    def write(questions):
        items = [{"query": q, "choices": ["mat", "hat"], "gold": 1} for q in questions]
        (tmp_path / "piqa.jsonl").write_text("\n".join(map(json.dumps, items)))
        items = [{"question": q, "answer": "so\n#### 4"} for q in questions]
        for name in ("gsm8k_test.jsonl", "gsm8k_train.jsonl"):
            (tmp_path / name).write_text("\n".join(map(json.dumps, items)))
        return tmp_path

    return write


def answers(model, directory, monkeypatch):
    """What a model writes to the questions of gsm8k."""
    kept = []
    plain = lm_eval.simple_evaluate

    def evaluate(*arguments, **options):
        found = plain(*arguments, **options)
        kept.extend(item["resps"] for item in found["samples"]["gsm8k"])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    task_scores(model, ["gsm8k"], task_dir=directory, num_fewshot=0)
    monkeypatch.setattr(lm_eval, "simple_evaluate", plain)
    return kept


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_return_sequences": 2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1, "cache_implementation": "static"},
        {"return_dict_in_generate": True, "output_scores": True},
        {"stop_strings": ["t"], "max_new_tokens": 2, "max_time": 1e-6},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_answers_are_the_likeliest_tokens_whatever_a_file_says(
    make_model, tasks, tmp_path, monkeypatch, settings
):
    directory, model = tasks(QUESTIONS[:2]), tmp_path / "model"
    plain = answers(make_model(), directory, monkeypatch)
    shutil.copytree(make_model(), model)
    written = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(written | settings))
    assert answers(model, directory, monkeypatch) == plain
    assert any(text for ((text,),) in plain)


@pytest.mark.parametrize("task", ["piqa", "gsm8k"])
def test_requests_beyond_the_positions_are_counted(make_model, tasks, capsys, task):
    model = make_model()
    directory = tasks([*QUESTIONS, "the cat " * 600])
    task_scores(model, [task], task_dir=directory, num_fewshot=0)
    count = 2 if task == "piqa" else 1  # one request for every choice
    assert (
        f"truedepth: note: {count} requests were longer than the 512 positions of {model.name};"
        " lm-evaluation-harness left out their beginnings.\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("task", ["piqa", "gsm8k"])
def test_tokens_without_a_row(make_model, tasks, task):
    loaded = td.load(make_model(vocab_size=len(byte_tokenizer())))
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    directory = tasks([*QUESTIONS, "the <|user|> cat"])
    with pytest.raises(td.TruedepthError, match=r"gives '<\|user\|>' the id"):
        task_scores(loaded, [task], task_dir=directory, num_fewshot=0)
    task_scores(loaded, [task], task_dir=tasks(QUESTIONS), num_fewshot=0)


def test_padding_without_a_row(make_model, tasks, monkeypatch):
    """A padding token that was added later pads with nothing that the model reads."""
    directory = tasks(QUESTIONS)
    plain = answers(td.load(make_model(vocab_size=275)), directory, monkeypatch)
    loaded = td.load(make_model(vocab_size=275))
    loaded.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert loaded.tokenizer.pad_token_id == 275
    assert answers(loaded, directory, monkeypatch) == plain
    assert loaded.tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize("task", ["piqa", "gsm8k"])
def test_a_tokenizer_with_a_beginning_only(make_model, tasks, task):
    loaded = td.load(make_model())
    tokenizer, rows = loaded.tokenizer, len(loaded.tokenizer)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<end>", None, None
    task_scores(loaded, [task], task_dir=tasks(QUESTIONS), num_fewshot=0)
    assert len(tokenizer) == rows and tokenizer.pad_token is None


def test_a_tokenizer_without_beginning_and_end(make_model, tasks):
    loaded = td.load(make_model())
    loaded.tokenizer.eos_token = None
    with pytest.raises(td.TruedepthError, match="neither a BOS nor an EOS token"):
        task_scores(loaded, ["piqa"], task_dir=tasks(QUESTIONS))


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), RuntimeError("out of memory")])
def test_errors_of_the_harness(make_model, tasks, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(lm_eval, "simple_evaluate", fail)
    with pytest.raises(
        td.TruedepthError, match=f"cannot run piqa: {type(error).__name__}: {error}"
    ):
        task_scores(make_model(), ["piqa"], task_dir=tasks(QUESTIONS))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"query": "a \\ud83d", "choices": ["x", "y"], "gold": 1}', r"line 2 holds .*\\ud83d"),
        (b'{"query": "a", "choices": ["x", "\\ude00"], "gold": 1}', r"line 2 holds .*\\ude00"),
        (b'{"query": "\xff", "choices": ["x", "y"], "gold": 1}', "Line 2 of .*is not UTF-8"),
        (b"[" * 200_000, "line 2: not valid JSON"),
    ],
)
def test_items_that_are_no_text(make_model, tasks, line, words):
    directory = tasks(QUESTIONS[:1])
    path = directory / "piqa.jsonl"
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(td.TruedepthError, match=words):
        task_scores(make_model(), ["piqa"], task_dir=directory)


def test_requests_go_through_the_chat_template(make_model, tasks, tmp_path, monkeypatch):
    out, directory = tmp_path / "chat", tasks(QUESTIONS)
    shutil.copytree(make_model(), out)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
    )
    tokenizer.save_pretrained(out)
    asked = []
    plain = lm_eval.simple_evaluate

    def evaluate(*arguments, **options):
        found = plain(*arguments, **options)
        asked.extend(item["arguments"][0][0] for item in found["samples"]["gsm8k"])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    found = task_scores(out, ["gsm8k"], task_dir=directory, num_fewshot=1, limit=2, chat=True)
    assert found.chat
    for request, question in zip(asked, QUESTIONS, strict=False):
        example, reply, last = request.removesuffix("\n[assistant]").split("\n[")
        assert example.startswith("[user] ")
        assert reply.startswith("assistant] ")
        assert last.startswith("user] ")
        assert question in last
    with pytest.raises(td.TruedepthError, match="has no chat template for --chat"):
        task_scores(make_model(), ["gsm8k"], task_dir=directory, num_fewshot=1, chat=True)


def test_code_is_run_if_that_is_allowed(make_model, tasks, monkeypatch):
    allowed = []

    def run_code(*_, confirm_run_unsafe_code, **__):
        allowed.append(os.environ.get("HF_ALLOW_CODE_EVAL"))
        if not confirm_run_unsafe_code:
            raise ValueError("Attempted to run task: humaneval which is marked as unsafe. Set …")
        items = [
            {"doc_id": i, "filter": "none", "metrics": ["pass@1"], "pass@1": i % 2}
            for i in range(4)
        ]
        return {"samples": {"piqa": items}, "results": {"piqa": {"pass@1,none": 0.5}}}

    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    monkeypatch.setattr(lm_eval, "simple_evaluate", run_code)
    with pytest.raises(td.TruedepthError, match="on this machine; allow it with --run-code"):
        task_scores(make_model(), ["piqa"], task_dir=tasks(QUESTIONS))
    found = task_scores(make_model(), ["piqa"], task_dir=tasks(QUESTIONS), run_code=True)
    assert [(score.metric, score.value) for score in found.scores] == [("pass@1", 0.5)]
    assert allowed == [None, "1"]


def test_a_package_that_a_task_lacks_is_named(make_model, tasks, monkeypatch):
    def lacking(*_, **__):
        raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")

    monkeypatch.setattr(lm_eval, "simple_evaluate", lacking)
    with pytest.raises(td.TruedepthError, match="needs the package langdetect; pip install lang"):
        task_scores(make_model(), ["piqa"], task_dir=tasks(QUESTIONS))
