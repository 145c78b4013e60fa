from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import truedepth as td
from truedepth.text import default_text, read_text, token_windows

TEXT = "the cat sat on the mat and then the hat sat on the cat, and 42 mice ran. " * 40


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def plainly(loaded, windows):
    return loaded.model(windows).logits[:, :-1].detach(), windows[:, 1:]


def test_against_plain_formulas(pair, text):
    ours, theirs = pair
    measured = td.perplexity(ours, against=theirs, text=text, window=48, windows=7, batch_size=3)
    ids = theirs.tokenizer(TEXT)["input_ids"]
    windows = torch.tensor(ids[: 7 * 48]).reshape(7, 48)
    logits, targets = plainly(ours, windows)
    reference, _ = plainly(theirs, windows)
    nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(7, 47)
    base = cross_entropy(reference.flatten(0, 1), targets.flatten(), reduction="none").view(7, 47)
    excess = (nll - base).mean(1)
    kl = kl_div(
        log_softmax(logits, -1), log_softmax(reference, -1), log_target=True, reduction="none"
    )
    assert measured.windows == 7
    assert measured.tokens == 7 * 47
    assert measured.nll == pytest.approx(nll.mean().item(), abs=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(nll.mean().item()), rel=1e-4)
    assert measured.excess == pytest.approx(excess.mean().item(), abs=1e-5)
    assert measured.excess_stderr == pytest.approx(excess.std().item() / 7**0.5, abs=1e-5)
    assert measured.kl == pytest.approx(kl.sum(-1).mean().item(), abs=1e-5)
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
    assert measured.top1_agreement == pytest.approx(agreement, abs=1e-6)
    assert measured.kl > 1e-3


def test_a_model_against_itself(pair, text):
    measured = td.perplexity(pair[1], against=pair[1], text=text, window=64)
    assert measured.excess == 0
    assert measured.excess_stderr == 0
    assert measured.kl == pytest.approx(0, abs=1e-9)
    assert measured.top1_agreement == 1


def test_batch_size_does_not_matter(pair, text):
    figures = [td.perplexity(pair[0], text=text, window=64, batch_size=n).nll for n in (1, 4, 99)]
    assert figures == pytest.approx([figures[0]] * 3, abs=1e-5)


def test_the_default_text_gives_the_same_figure_twice(pair):
    first, second = (td.perplexity(pair[0], window=128, windows=4) for _ in range(2))
    assert first == second
    assert len(default_text()) > 300_000


def test_jsonl_documents_are_joined(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("one", "two")) + "\n")
    assert read_text(path) == "one\n\ntwo"


def test_jsonl_documents_with_other_line_ends_and_a_byte_order_mark(tmp_path):
    document = "a \u2028 b \x85 c \x0c d"
    line = json.dumps({"text": document}, ensure_ascii=False)
    (tmp_path / "text.jsonl").write_text(f"\ufeff{line}\n{line}\n", encoding="utf-8")
    assert read_text(tmp_path / "text.jsonl") == f"{document}\n\n{document}"


def test_a_hopeless_model_has_infinite_perplexity(pair, text):
    measured = td.perplexity(pair[0], text=text, window=64, windows=1)
    assert replace(measured, nll=1000.0).perplexity == math.inf


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"batch_size": 0}, {"window": 1}])
def test_counts_that_are_none(pair, text, wrong):
    with pytest.raises(td.TruedepthError, match="t least"):
        td.perplexity(pair[0], text=text, **wrong)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "empty"),
        ("a.txt", " \n ", "empty"),
        ("a.jsonl", "", "empty"),
        ("a.jsonl", '{"text": "x"}\n{"txt": 1}\n', "Line 2 .*'text'"),
        ("a.jsonl", '{"text": "x"}\n{\n', "Line 2 .*JSON"),
        ("a.jsonl", "[1]\n", "Line 1 .*'text'"),
        ("a.pdf", "x", r"neither a \.txt nor"),
    ],
)
def test_bad_texts(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(td.TruedepthError, match=words):
        read_text(tmp_path / name)


def test_missing_and_binary_texts(tmp_path):
    with pytest.raises(td.TruedepthError, match="Cannot read the text"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(td.TruedepthError, match="UTF-8"):
        read_text(tmp_path / "a.txt")


def test_text_shorter_than_a_window(pair):
    with pytest.raises(td.TruedepthError, match="fewer than one window of 512"):
        token_windows(pair[0].source, "the cat", 512)


def test_windows_begin_with_bos_where_texts_do(pair):
    tokenizer = pair[0].tokenizer

    class WithBos:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True, **options):
            ids = tokenizer(text)["input_ids"]
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    source = replace(pair[0].source, load_tokenizer=WithBos)
    windows = token_windows(source, TEXT, 16, 3)
    ids = tokenizer(TEXT)["input_ids"]
    assert windows.tolist() == [[7, *ids[15 * i : 15 * i + 15]] for i in range(3)]


def test_models_with_other_tokenizers_are_not_compared(pair, text):
    class Reversed:
        bos_token_id = None

        def __call__(self, text, **options):
            ids = pair[0].tokenizer(text)["input_ids"]
            return {"input_ids": [row[::-1] if isinstance(row, list) else row for row in ids]}

    other = replace(pair[1].source, load_tokenizer=Reversed)
    with pytest.raises(td.TruedepthError, match="different tokens"):
        td.perplexity(pair[0], against=replace(pair[1], source=other), text=text, window=64)


def test_logits_that_are_not_numbers(make_model, text):
    broken = td.load(make_model())
    broken.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(td.TruedepthError, match="not finite") as caught:
        td.perplexity(broken, text=text, window=64)
    assert caught.value.exit_code == 1
