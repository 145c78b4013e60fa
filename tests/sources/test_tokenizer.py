"""A directory's tokenizer: right ids, or the reason why there are none."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from transformers import (
    AutoTokenizer,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.convert_slow_tokenizer import import_protobuf

import truedepth as td
from truedepth.sources import tokenizer as loading

PLAN = td.Plan(6, [[1, 2]])
TEXTS = ["the cat", "that hat 12", "Zwölf, 日本"]


def without_tokenizer(model, tmp_path):
    source = Path(shutil.copytree(model, tmp_path / "source"))
    for file in source.glob("tokenizer*"):
        file.unlink()
    return source


def copy_of(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "source"))


def edit(file, **changes):
    held = json.loads(file.read_text()) if file.exists() else {}
    held = {key: value for key, value in (held | changes).items() if value is not None}
    file.write_text(json.dumps(held))


def sentencepiece(file):
    """A SentencePiece model of bytes, letters and some words."""
    model = import_protobuf().ModelProto()
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{b:02X}>", 6) for b in range(256))]
    pieces += [(piece, 1) for piece in ("▁t", "he", "▁the", "at", "▁c", "▁cat", "▁")]
    pieces += [(letter, 1) for letter in "abcdefghijklmnopqrstuvwxyz"]
    for rank, (piece, kind) in enumerate(pieces):
        added = model.pieces.add()
        added.piece, added.type, added.score = piece, kind, -float(max(0, rank - 258))
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    file.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": False},
        {},  # transformers' own choice puts no space before a text, until 5.24
    ],
)
def test_sentencepiece_alone(make_model, tmp_path, settings):
    source = without_tokenizer(make_model(bos_token_id=1, eos_token_id=2), tmp_path)
    sentencepiece(source / "tokenizer.model")
    if settings:
        edit(source / "tokenizer_config.json", **settings)
    td.convert(source, tmp_path / "out", PLAN)
    processor = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ours = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for each in (source, tmp_path / "out"):
        tokenizer = td.open_source(each).tokenizer
        for text in TEXTS:
            expected = processor.encode(text)
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
            assert ours.encode(text, add_special_tokens=False).ids == expected
    made = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    known = {"LlamaTokenizer"} if settings else {"LlamaTokenizer", "PreTrainedTokenizerFast"}
    assert made["tokenizer_class"] in known
    assert (tmp_path / "out" / "tokenizer.model").exists()


def test_a_class_that_splits_otherwise_than_sentencepiece_is_refused(make_model, tmp_path):
    source = without_tokenizer(make_model(), tmp_path)
    sentencepiece(source / "tokenizer.model")
    edit(source / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")
    with pytest.raises(td.TruedepthError, match=r"splits text otherwise than .*tokenizer\.model"):
        td.open_source(source).tokenizer  # noqa: B018


def tekken(file, **changes):
    words = ["th", "the", " t", " th", " the", " c", " ca", " cat", "at"]
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in words]
    names = ["<unk>", "<s>", "</s>", "[INST]"]
    edit(
        file,
        **{
            "config": {
                "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
                "default_vocab_size": len(tokens) + 10,
                "default_num_special_tokens": 10,
                "version": "v11",
            },
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
                for rank, token in enumerate(tokens)
            ],
            "special_tokens": [
                {"rank": rank, "token_str": name, "is_control": True}
                for rank, name in enumerate(names)
            ],
            **changes,
        },
    )


def test_tekken_json_alone(make_model, tmp_path):
    """Ids are ranks behind the ten special tokens."""
    model = make_model(family=MistralConfig, sliding_window=None)
    source = without_tokenizer(model, tmp_path)
    tekken(source / "tekken.json")
    td.convert(source, tmp_path / "out", PLAN)
    expected = [10 + 257, 10 + 263, 10 + 32, 10 + 49]
    for each in (source, tmp_path / "out"):
        tokenizer = td.open_source(each).tokenizer
        assert tokenizer("the cat 1", add_special_tokens=False)["input_ids"] == expected
    assert (tmp_path / "out" / "tekken.json").read_bytes() == (source / "tekken.json").read_bytes()
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert made.encode("the cat 1", add_special_tokens=False).ids == expected


def test_a_tokenizer_that_cannot_be_loaded_here_goes_along(make_model, tmp_path, capsys):
    source = without_tokenizer(make_model(), tmp_path)
    tekken(source / "tekken.json", special_tokens=None)
    td.convert(source, tmp_path / "out", PLAN)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("truedepth: note: The tokenizer goes along as it")
    assert "mistral-common" in said[0]
    assert (tmp_path / "out" / "tekken.json").read_bytes() == (source / "tekken.json").read_bytes()


@pytest.mark.parametrize(
    ("family", "named", "read_by"),
    [
        (LlamaConfig, "LlamaTokenizerFast", None),  # the file is byte-level; releases differ
        (Qwen2Config, "PreTrainedTokenizerFast", "TokenizersBackend"),  # as it is
        (Qwen2Config, "TokenizersBackend", "TokenizersBackend"),
        (Qwen2Config, "Qwen2Tokenizer", "Qwen2Tokenizer"),
        (Qwen2Config, "LlamaTokenizerFast", "Qwen2Tokenizer"),  # wrong, as transformers knows
        (MistralConfig, "LlamaTokenizer", "TokenizersBackend"),
        (GraniteConfig, "GPT2Tokenizer", "TokenizersBackend"),
        (GemmaConfig, "GPT2Tokenizer", "GPT2Tokenizer"),
    ],
)
def test_an_original_and_what_is_made_of_it_are_read_by_one_class(
    make_model, tmp_path, family, named, read_by
):
    """Also where transformers reads it, which does not know the type of what is made."""
    source = copy_of(make_model(family=family), tmp_path)
    edit(source / "tokenizer_config.json", tokenizer_class=named)
    td.convert(source, tmp_path / "out", PLAN)
    ours, theirs = (td.open_source(each).tokenizer for each in (tmp_path / "out", source))
    elsewhere = AutoTokenizer.from_pretrained(tmp_path / "out", config=PreTrainedConfig())
    plainly = type(AutoTokenizer.from_pretrained(source)).__name__
    for each in (ours, theirs, elsewhere):
        assert type(each).__name__ == (read_by or plainly)
        assert each.get_vocab() == theirs.get_vocab()
        for text in (*TEXTS, "it's 1234  or\n\nso"):
            assert each(text)["input_ids"] == theirs(text)["input_ids"]


def cut(source):
    file = source / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:3000])


def not_utf8(source):
    file = source / "tokenizer.json"
    held = file.read_bytes()
    file.write_bytes(held[:500] + b"\xff" + held[500:])


def newer(source):
    edit(source / "tokenizer.json", pre_tokenizer={"type": "Quantum"})


def not_an_object(source):
    (source / "special_tokens_map.json").write_text("[1]")


def no_merges(source):
    held = json.loads((source / "tokenizer.json").read_text())["model"]
    nothing(source)
    edit(source / "vocab.json", **held["vocab"])


def unknown_class(source):
    no_merges(source)
    (source / "merges.txt").write_text("#version: 0.2\n")
    edit(source / "tokenizer_config.json", tokenizer_class="OwnTokenizer")


def nothing(source):
    (source / "tokenizer.json").unlink()


def ranks(name):
    def make(source):
        nothing(source)
        lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
        (source / name).write_text("\n".join(lines))

    return make


def bad_added(source):
    edit(source / "tokenizer_config.json", added_tokens_decoder={"x": 3})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, ["tokenizer.json is not valid JSON", "char 2977"]),
        (not_utf8, ["tokenizer.json is not valid JSON", "position 500"]),
        (newer, ["tokenizer.json is damaged", f"than tokenizers {tokenizers.__version__}"]),
        (not_an_object, ["special_tokens_map.json does not hold a JSON object"]),
        (no_merges, ["vocab.json but neither merges.txt nor tokenizer.json"]),
        (unknown_class, ["tokenizer_config.json names the class 'OwnTokenizer'"]),
        (nothing, ["has no tokenizer: it has none of tokenizer.json, tokenizer.model,"]),
        (ranks("qwen.tiktoken"), ["is qwen.tiktoken", "add a tokenizer.json"]),
        (ranks("tokenizer.model"), ["is tokenizer.model", "pip install tiktoken"]),
        (bad_added, ["TypeError", "added_tokens_decoder"]),
    ],
)
def test_reasons(make_model, tmp_path, monkeypatch, damage, words):
    monkeypatch.setattr(loading, "_installed", lambda module: module != "tiktoken")
    source = copy_of(make_model(), tmp_path)
    damage(source)
    with pytest.raises(td.TruedepthError) as caught:
        td.open_source(source).tokenizer  # noqa: B018
    for word in [str(source), *words]:
        assert word in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("make", "name", "package"),
    [
        (sentencepiece, "tokenizer.model", "sentencepiece"),
        (sentencepiece, "spiece.model", "sentencepiece"),
        (lambda file: tekken(file, special_tokens=None), "tekken.json", "mistral-common"),
    ],
)
def test_the_package_that_is_missing_is_named(tmp_path, monkeypatch, make, name, package):
    monkeypatch.setattr(loading, "_installed", lambda module: False)
    make(tmp_path / name)
    said = loading._reason(tmp_path, False)
    assert name in said and f"pip install {package}" in said


def test_the_parts_of_a_package_are_looked_for(monkeypatch):
    assert loading._installed("sentencepiece") and loading._installed("google.protobuf")
    assert not loading._installed("no_such_package") and not loading._installed("no.such.part")
