"""Texts that are none, tokens that a model lacks, and the positions that it has."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import truedepth as td
from tiny_models import byte_tokenizer
from truedepth.text import documents, positions_of, read_text, token_windows, window_of

LINE = json.dumps({"text": "the cat"}) + "\n"

BROKEN = {
    "half a character": (
        "a.jsonl",
        LINE + '{"text": "a \\ud83d b"}',
        r"^Line 2 .*a.jsonl.*\\ud83d",
    ),
    "the other half": (
        "a.jsonl",
        '{"text": "\\ude00"}',
        r"^Line 1 of .*\\ude00, as its character 1",
    ),
    "bytes in a line": ("a.jsonl", LINE.encode() * 2 + b'{"text": "\xff"}', "^Line 3 of .* UTF-8"),
    "bytes in a text": ("a.txt", b"a\nb\nc \xe9\n", "^Line 3 of .*a.txt is not UTF-8"),
    "half of two bytes": ("a.txt", "the \u00e9".encode()[:-1], "^Line 1 of .*a.txt is not UTF-8"),
    "UTF-16": ("a.txt", "the cat".encode("utf-16"), "is not UTF-8"),
    "UTF-16 without a mark": ("a.txt", "the cat sat".encode("utf-16-le"), "looks like UTF-16"),
    "brackets without end": ("a.jsonl", LINE + "[" * 200_000, "^Line 2 of .* not valid JSON"),
    "a number without end": (
        "a.jsonl",
        '{"n": ' + "9" * 9999 + "}",
        "^Line 1 of .* not valid JSON",
    ),
    "no text": ("a.jsonl", LINE + '{"text": NaN}', "^Line 2 of .*string 'text'"),
}


@pytest.mark.parametrize(("name", "content", "words"), BROKEN.values(), ids=BROKEN)
def test_texts_that_are_none(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(td.TruedepthError, match=words):
        list(documents(path))


def test_texts_that_are_odd(tmp_path):
    """Whole pairs of surrogates, nulls, line separators within lines, a byte order mark."""
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "\\ud83d\\ude00"}\n{"text": "a\\u0000b"}\n'
        + '{"text": "c\u2028d"}'.encode()
    )
    assert list(documents(tmp_path / "a.jsonl")) == ["\U0001f600", "a\0b", "c\u2028d"]
    (tmp_path / "a.txt").write_text("the c\0t")
    assert read_text(tmp_path / "a.txt") == "the c\0t"


def test_a_name_that_no_checkpoint_could_record(tmp_path):
    path = tmp_path / b"a\xff.txt".decode("utf-8", "surrogateescape")
    path.write_text("the cat")
    with pytest.raises(td.TruedepthError, match=r"name of the text .*byte 0xff, which is"):
        list(documents(path))


@pytest.fixture
def lacking(make_model):
    """A model with one row fewer than its tokenizer has tokens."""
    source = td.open_source(make_model(vocab_size=len(byte_tokenizer())))
    source.tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    return source


def test_tokens_without_a_row(lacking):
    rows = lacking.config["vocab_size"]
    words = rf"'<\|user\|>' the id {rows}, and the model has embeddings for {rows} tokens"
    with pytest.raises(td.TruedepthError, match=words):
        token_windows(lacking, "the cat <|user|> sat", 2)
    assert token_windows(lacking, "the cat sat on <|user|>", 2, 1).max() < rows  # it is not used


def test_a_beginning_without_a_row(lacking, monkeypatch):
    monkeypatch.setattr("truedepth.text.beginning", lambda _: [lacking.config["vocab_size"]])
    with pytest.raises(td.TruedepthError, match=r"'<\|user\|>' the id"):
        token_windows(lacking, "the cat sat on the mat", 4)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1, None, 2], "no token for a part of the text"),
        (ValueError("no [UNK]"), r"split .*\[UNK\]"),
    ],
)
def test_tokenizers_that_do_not_know_a_word(lacking, ids, words):
    class Odd:
        bos_token_id = None

        def __call__(self, texts, **_):
            if isinstance(ids, Exception) and texts != "x":
                raise ids
            return {"input_ids": [ids] * len(texts)}

    with pytest.raises(td.TruedepthError, match=words):
        token_windows(replace(lacking, load_tokenizer=Odd), "the cat", 3)


POSITIONS = {
    "as written": (4096, None, 4096),
    "none": (None, {"rope_type": "yarn", "factor": 4.0}, None),
    "plain": (4096, {"rope_type": "default", "rope_theta": 1e4}, 4096),
    "yarn, not yet scaled": (
        32768,
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "yarn, scaled": (
        131072,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        131072,
    ),
    "yarn, more than scaled": (
        40960,
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 32768},
        40960,
    ),
    "linear": (4096, {"type": "linear", "factor": 4}, 16384),
    "dynamic": (4096, {"rope_type": "dynamic", "factor": 2.5}, 10240),
    "llama3": (
        131072,
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        131072,
    ),
    "longrope": (
        131072,
        {"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096},
        131072,
    ),
    "several": (131072, {"full_attention": {"rope_type": "linear", "factor": 8.0}}, 131072),
}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(("written", "scaling", "positions"), POSITIONS.values(), ids=POSITIONS)
def test_positions(make_model, key, written, scaling, positions):
    source = td.open_source(make_model())
    rest = {k: v for k, v in source.config.items() if not k.startswith("rope_")}
    source = replace(source, config=rest | {"max_position_embeddings": written, key: scaling})
    assert positions_of(source.config) == positions
    if positions is None:
        assert window_of(source, 1 << 30) == 1 << 30
        assert window_of(source, None) == 512
        return
    assert window_of(source, positions) == positions
    assert window_of(source, None) == min(512, positions)
    assert window_of(source, None, 256) == min(256, positions)
    with pytest.raises(td.TruedepthError, match=f"longer than the {positions} positions"):
        window_of(source, positions + 1)


def test_windows_hold_the_text(lacking):
    text = "the cat sat on the mat"
    ids = lacking.tokenizer(text)["input_ids"]
    assert torch.equal(
        token_windows(lacking, text, 2).flatten(), torch.tensor(ids[: len(ids) // 2 * 2])
    )
