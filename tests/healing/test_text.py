"""Text to train on: mixtures, windows that are set aside, and text that cannot be read."""

from __future__ import annotations

import json
import re

import huggingface_hub
import pytest
import torch

import truedepth as td
from tiny_models import byte_tokenizer
from truedepth.healing.options import TextPart
from truedepth.healing.text import (
    Part,
    document_tokens,
    mixed,
    packed,
    part_documents,
    text_parts,
    training_text,
)
from truedepth.healing.training import Passes


@pytest.fixture(scope="module")
def source(make_model):
    return td.open_source(make_model())


def documents(path, count, letter, words=40):
    lines = [json.dumps({"text": f"{letter} {number} " * words}) for number in range(count)]
    path.write_text("\n".join(lines))
    return TextPart(str(path))


def read(parts, source, directory, windows, validation, length=32):
    return training_text(
        text_parts(parts, source, 0),
        source,
        directory,
        length=length,
        windows=windows,
        validation=validation,
    )


def windows_of(texts, source, length):
    return list(packed(document_tokens(texts, source), source, length))


def test_documents_are_joined_by_the_end_of_text(source):
    windows = windows_of(["one two", "three"], source, 4)
    ids = [
        *source.tokenizer("one two", add_special_tokens=False)["input_ids"],
        source.tokenizer.eos_token_id,
        *source.tokenizer("three", add_special_tokens=False)["input_ids"],
        source.tokenizer.eos_token_id,
    ]
    assert windows == [ids[i : i + 4] for i in range(0, len(ids) // 4 * 4, 4)]


def test_windows_set_aside_are_never_trained_on(source, tmp_path):
    part = documents(tmp_path / "a.jsonl", 60, "a")
    text = read([part], source, tmp_path / "kept", 40, 5)
    assert (text.trained.shape, text.validation.shape) == ((40, 32), (5, 32))
    everything = windows_of(part_documents(part.name), source, 32)
    aside = (7, 15, 23, 31, 39)
    assert text.validation.tolist() == [everything[i] for i in aside]
    assert text.trained.tolist() == [everything[i] for i in range(45) if i not in aside]
    assert text.tokens == {"a.jsonl": 40 * 32}


def test_it_is_read_once(source, tmp_path):
    part = documents(tmp_path / "a.jsonl", 60, "a")
    first = read([part], source, tmp_path / "kept", 40, 5)
    (tmp_path / "a.jsonl").unlink()
    again = read([part], source, tmp_path / "kept", 40, 5)
    assert torch.equal(first.trained, again.trained)
    assert torch.equal(first.validation, again.validation)


def test_a_mixture_has_the_shares_that_weights_say(source, tmp_path):
    parts = [documents(tmp_path / f"{letter}.jsonl", 90, letter) for letter in "ab"]
    parts[1] = TextPart(parts[1].name, 3.0)
    text = read(parts, source, tmp_path / "kept", 80, 8)
    assert text.tokens == {"a.jsonl": 20 * 32, "b.jsonl": 60 * 32}


@pytest.mark.parametrize(
    ("texts", "added", "share", "expected"),
    [
        ([1, 3], [2], 0.25, [0.1875, 0.5625, 0.25]),
        ([5], [1, 3], 0.4, [0.6, 0.1, 0.3]),
        ([2, 2], [], 0.25, [0.5, 0.5]),
        ([], [1, 3], 0.25, [0.25, 0.75]),
        ([1], [4], 1.0, [1.0]),
    ],
)
def test_what_is_added_has_a_share(texts, added, share, expected):
    texts, added = ([Part(str(w), w, []) for w in weights] for weights in (texts, added))
    found = mixed(texts, added, share)
    assert [part.weight for part in found] == pytest.approx(expected)
    assert found[-1].title == (added or texts)[-1].title


def test_a_text_that_ends_early_leaves_its_share_to_the_others(source, tmp_path):
    parts = [documents(tmp_path / "a.jsonl", 3, "a"), documents(tmp_path / "b.jsonl", 90, "b")]
    text = read(parts, source, tmp_path / "kept", 60, 4)
    assert len(text.trained) == 60
    assert 0 < text.tokens["a.jsonl"] < 20 * 32
    short = read(parts[:1], source, tmp_path / "short", 60, 4)
    assert 8 < len(short.trained) + len(short.validation) < 20
    assert len(short.validation) >= 1


def test_directories_are_read_file_by_file(source, tmp_path):
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "b.txt").write_text("bee")
    (tmp_path / "data" / "inner" / "c.jsonl").write_text('{"text": "sea"}\n{"text": "see"}')
    (tmp_path / "data" / "notes.md").write_text("not this")
    assert list(part_documents(str(tmp_path / "data"))) == ["bee", "sea", "see"]


def test_datasets_of_the_hub_are_streamed(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        rows = [{"text": f"document {number}"} for number in range(30)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = list(part_documents("owner/name:english", seed=1))
    assert asked == [(("owner/name", "english"), {"split": "train", "streaming": True})]
    assert sorted(found) == sorted(f"document {number}" for number in range(30))
    assert found != sorted(found)


def test_a_dataset_without_text_is_named(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        return datasets.Dataset.from_list([{"content": "x"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(td.TruedepthError, match=r"no column 'text' .* it has 'content'"):
        list(part_documents("owner/name"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "a.txt is empty"),
        ("a.jsonl", '{"text": ""}', "a.jsonl is empty"),
        ("a.jsonl", '{"content": "x"}', "Line 1 of .*'text'"),
        ("a.txt", "short", "too few to train on"),
        ("a.csv", "x", "neither a .txt nor a .jsonl"),
        ("a.jsonl", '{"text": "x"}\n{"text": "\\ud83d"}', r"Line 2 of .*\\ud83d"),
    ],
)
def test_text_that_cannot_be_trained_on(source, tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(td.TruedepthError, match=words):
        read([TextPart(str(tmp_path / name))], source, tmp_path / "kept", 8, 2)


@pytest.mark.parametrize("token", ["<|user|>", "</s>"])
def test_tokens_that_the_model_has_no_embedding_for(make_model, tmp_path, token):
    """One in the text, and one that ends every document."""
    source = td.open_source(make_model(vocab_size=len(byte_tokenizer())))
    if token == "</s>":
        source.tokenizer.add_special_tokens({"eos_token": token})
    else:
        source.tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    (tmp_path / "a.txt").write_text("the <|user|> cat " * 99)
    words = rf"gives '{re.escape(token)}' the id {source.config['vocab_size']}"
    with pytest.raises(td.TruedepthError, match=words):
        read([TextPart(str(tmp_path / "a.txt"))], source, tmp_path / "kept", 8, 2)
    assert not (tmp_path / "kept" / "tokens.json").exists()


def test_a_dataset_that_breaks_off(monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(td.TruedepthError, match="can be read: DatasetGenerationError: An error"):
        list(part_documents("owner/name"))


def test_a_directory_without_text(tmp_path):
    with pytest.raises(td.TruedepthError, match=r"holds no \.txt or \.jsonl files"):
        list(part_documents(str(tmp_path)))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    # The variable HF_HUB_OFFLINE is read when the libraries are imported.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(td.TruedepthError, match="neither a path here nor a dataset of the hub"):
        list(part_documents("nobody/nothing"))


def test_weights_are_read_from_the_name(tmp_path):
    assert TextPart.parse("owner/name") == TextPart("owner/name")
    assert TextPart.parse("a.txt=2.5") == TextPart("a.txt", 2.5)
    (odd := tmp_path / "a=b.txt").write_text("x")
    assert TextPart.parse(str(odd)) == TextPart(str(odd))
    with pytest.raises(td.TruedepthError, match="weight 'x' is not a number above 0"):
        TextPart.parse("a.txt=x")


@pytest.mark.parametrize("count", [5, 17, 40])
def test_every_pass_reads_all_windows_in_an_order_of_its_own(count):
    ids = torch.arange(17)[:, None].expand(17, 4)
    found = [int(item["number"]) for item in Passes(ids, count, seed=0)]
    assert found == [int(item["input_ids"][0]) for item in Passes(ids, count, seed=0)]
    passes = [found[start : start + 17] for start in range(0, count, 17)]
    assert all(len({*each}) == len(each) for each in passes)
    assert sum(map(len, passes)) == count
    assert len({str(sorted(each)) for each in passes if len(each) == 17}) <= 1
    assert len({str(each[:6]) for each in passes}) == len(passes)
    assert found != [int(item["number"]) for item in Passes(ids, count, seed=1)]
