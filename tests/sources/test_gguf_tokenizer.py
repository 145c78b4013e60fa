"""Tokenizers of GGUF files: what of their metadata is honoured, and what is refused by name.

tests/sources/test_llama_cpp_tokens.py compares token ids with llama.cpp's own.
"""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import truedepth as td
from gguf_files import write_gguf
from gguf_vocabularies import (
    CONTROL,
    GGML,
    NORMAL,
    SPECIAL,
    USER,
    byte_level,
    sentencepiece,
    small,
    write_vocabulary,
)
from tiny_models import TINY, random_model
from token_texts import texts
from truedepth.runtime.generation import answer
from truedepth.sources.gguf.overlaps import found_otherwise
from truedepth.sources.gguf.words import REFUSED, WORDS

TEXT = "the cats don't  see 1234567 naïve cafés\n\n  (a) 東京タワー <tool> x"


@pytest.fixture
def read(tmp_path):
    """The tokenizer of a file of such metadata."""
    return lambda fields, **options: (
        td.open_source(write_vocabulary(tmp_path / "m.gguf", fields, **options)).tokenizer
    )


def original(fields, split, **options):
    """What the metadata were made of, with the published way of splitting."""
    names = fields[f"{GGML}.tokens"]
    merges = [tuple(line.split(" ")) for line in fields[f"{GGML}.merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, **options))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([name for name, kind in SPECIAL.items() if kind == CONTROL])
    backend.add_tokens([name for name, kind in SPECIAL.items() if kind == USER])
    return backend


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}|"
    r" ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("name", "split", "whole"), [("llama-bpe", LLAMA_3, True), ("seed-coder", SEED_CODER, False)]
)
def test_ids_are_the_originals(read, name, split, whole):
    fields = byte_level(name)
    ours, theirs = read(fields), original(fields, split, ignore_merges=whole)
    begun = [fields[f"{GGML}.bos_token_id"]] if whole else []
    assert len(ours) == len(fields[f"{GGML}.tokens"])  # none beyond the embedding
    for text in texts(tuple(SPECIAL), count=600):
        if "\u017f" not in text:  # which the published patterns take for an s
            assert ours(text)["input_ids"] == begun + theirs.encode(text).ids, text
        assert ours.decode(ours(text)["input_ids"][len(begun) :]) == text


def test_what_begins_and_ends_a_text(read):
    for pre, more, begins, ends in (
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False, "add_eos_token": True}, False, True),
        ("tekken", {}, True, False),
        ("qwen2", {}, False, False),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ):
        fields = byte_level(pre) | {f"{GGML}.{key}": value for key, value in more.items()}
        ids = read(fields)("x")["input_ids"]
        assert (ids[0] == fields[f"{GGML}.bos_token_id"]) == begins
        assert (ids[-1] == fields[f"{GGML}.eos_token_id"]) == ends
        assert len(ids) == 1 + begins + ends
    assert read(sentencepiece())("x")["input_ids"][0] == 1  # and needs no metadata for it


def test_no_bos_token_is_named(read, capsys):
    tokenizer = read(byte_level() | {f"{GGML}.bos_token_id": None})
    assert len(tokenizer("x")["input_ids"]) == 1
    assert "truedepth: note: " in (said := capsys.readouterr().err)
    assert "names no such token" in said and said.count("\n") == 1


def test_a_space_before_a_text(read):
    for begin in (None, True, False):
        tokenizer = read(sentencepiece() | {f"{GGML}.add_space_prefix": begin})
        pieces = tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"])
        assert "".join(pieces[1:]) == ("the" if begin is False else "▁the")
        for text in ("the cat", "  a  b ", "naïve ☃\n"):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_an_ordinary_token_that_pads_is_still_found_in_words(read):
    fields = small(["th", "the"], ["t h", "th e"])
    plain = read(fields)
    padding = plain.convert_tokens_to_ids("t")
    tokenizer = read(fields | {f"{GGML}.padding_token_id": padding})
    assert tokenizer("the th t")["input_ids"] == plain("the th t")["input_ids"]


REFUSALS = {
    **{
        f"split {name}": (byte_level(name), name) for name in (*REFUSED, "llama-4-new", "Llama-BPE")
    },
    **{
        f"model {name}": (small() | {f"{GGML}.model": name}, f"{name!r}.*tokenizer.ggml.model")
        for name in ("bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace", "new")
    },
    "no model": (small() | {f"{GGML}.model": None}, "has no tokenizer"),
    "model none": (small() | {f"{GGML}.model": "none"}, "has no tokenizer"),
    "no merges": (byte_level() | {f"{GGML}.merges": None}, "has no merges .*ggml.merges"),
    "no scores": (sentencepiece() | {f"{GGML}.scores": None}, "no scores .*ggml.scores"),
    "few scores": (sentencepiece() | {f"{GGML}.scores": [0.0, 1.0]}, "2 scores for"),
    "few types": (small() | {f"{GGML}.token_type": [1, 1]}, "2 token types for 258 tokens"),
    "two of a name": (small(["x", "Ġt", "x"]), "the tokens 88 and 257 one name, 'x'"),
    "a merge to nothing": (small(["Ġt"], ["Ġ t", "a b"]), "merges 'a' and 'b', but .* 'ab'"),
    "scores of no order": (
        sentencepiece() | {f"{GGML}.scores": [-1000.0] * len(sentencepiece()[f"{GGML}.tokens"])},
        "one score, -1000",
    ),
    "white space taken out": (
        sentencepiece() | {f"{GGML}.remove_extra_whitespaces": True},
        "remove_extra_whitespaces.* takes out white space",
    ),
    "characters replaced": (
        sentencepiece() | {f"{GGML}.precompiled_charsmap": [1, 2, 3]},
        "precompiled_charsmap",
    ),
    "small letters": (small() | {f"{GGML}.normalizer.lowercase": True}, "normalizer.lowercase"),
    "tokens held back": (small() | {f"{GGML}.suppress_tokens": [3]}, "suppress_tokens"),
    "EOS without a name": (
        small() | {f"{GGML}.eos_token_id": None, f"{GGML}.add_eos_token": True},
        "puts EOS into every text .* names no such token",
    ),
    "BOS without a name": (small() | {f"{GGML}.add_bos_token": True}, "puts BOS into every"),
    "a split that is no text": (small() | {f"{GGML}.pre": 3}, "splits text by 3"),
    "a token that is no number": (small() | {f"{GGML}.bos_token_id": "x"}, "is 'x', not the id"),
    "a yes that is none": (small() | {f"{GGML}.add_bos_token": "x"}, "is 'x', not a boolean"),
    "a template without text": (small() | {"tokenizer.chat_templates": ["a"]}, "template 'a'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(read, name):
    fields, words = REFUSALS[name]
    with pytest.raises(td.TruedepthError, match=f"(?s){words}"):
        read(fields)


def test_a_character_that_is_no_token(read):
    fields = sentencepiece()
    for key, more in (("tokens", "q🧿"), ("scores", -9e5), ("token_type", NORMAL)):
        fields[f"{GGML}.{key}"].append(more)
    with pytest.raises(td.TruedepthError, match="'q🧿', but none for '🧿' in it"):
        read(fields)


def test_a_byte_that_is_no_token(read):
    fields = sentencepiece()
    fields[f"{GGML}.tokens"][fields[f"{GGML}.tokens"].index("<0xF0>")] = "[lost]"
    with pytest.raises(td.TruedepthError, match="no token '<0xF0>'"):
        read(fields)


def test_every_refusal_comes_before_weights_are_read(tmp_path):
    """What metadata alone can say is said on opening."""
    for name in ("split gemma4", "model bert", "white space taken out", "no scores"):
        with pytest.raises(td.TruedepthError):
            td.open_source(write_vocabulary(tmp_path / "m.gguf", REFUSALS[name][0]))


def test_more_and_fewer_tokens_than_the_model_embeds(read):
    tokens = len(small()[f"{GGML}.tokens"])
    with pytest.raises(td.TruedepthError, match=f"{tokens} tokens, but embeds only {tokens - 1}"):
        read(small(), rows=tokens - 1)
    assert len(read(small(), rows=tokens + 7)) == tokens


def test_merges_that_nothing_leads_to_are_passed_over(read):
    """llama.cpp never gets to them, so that what they name need not be there."""
    fields = small(["th"], ["t h", "xy z", "xyz q", "nothing", "t h"])
    assert read(fields).tokenize("th the") == ["th", "Ġ", "th", "e"]


def test_tokens_that_there_are_not(read, capsys):
    tokenizer = read(small() | {f"{GGML}.padding_token_id": 4294967295})
    assert tokenizer.pad_token is None
    assert "has no token 4294967295" in capsys.readouterr().err


def test_special_tokens_that_overlap(read, capsys):
    assert found_otherwise(["  ", "    ", "\n\n", "<a>", "<b>"]) is None
    assert found_otherwise(["<a>", "a>b>"]) == "<a>b>"
    fields = small(["Ġt", "<a>", "a>b>"])
    fields[f"{GGML}.token_type"][-2:] = [CONTROL, CONTROL]
    assert read(fields).tokenize("<a>b>") == ["<a>", "b", ">"]
    assert "overlap, as in '<a>b>'" in capsys.readouterr().err


def templates(**more):
    return {f"tokenizer.chat_template{key}": text for key, text in more.items()}


def test_chat_templates(tmp_path, read):
    one, two = "{{ messages }}", "{{ tools }}"
    first, second = "tokenizer.chat_template", "tokenizer.chat_template.tool_use"
    assert read(small()).chat_template is None
    assert read(small() | {first: one}).chat_template == one
    both = {"default": one, "tool_use": two}
    listed = {first: one, second: two, "tokenizer.chat_templates": ["tool_use"]}
    assert read(small() | listed).chat_template == both
    assert read(small() | {first: one, second: two}).chat_template == both
    assert read(small() | {second: two}).chat_template == {"tool_use": two}
    source = td.open_source(write_vocabulary(tmp_path / "m.gguf", small() | listed))
    source.save_companions(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == both


def test_metadata_of_the_original_tokenizer_do_not_count(read):
    """llama.cpp does not read it, and it may be another."""
    fields = small() | {"tokenizer.huggingface.json": "{}"}
    assert read(fields)(TEXT) == read(small())(TEXT)


def turns(tmp_path, fields, ends):
    """A file of a model that goes on from "t" to the token `ends`, and from it to "t"."""
    names = fields[f"{GGML}.tokens"]
    model = random_model(LlamaConfig(**TINY | {"vocab_size": len(names), "num_hidden_layers": 2}))
    now = names.index("t")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        embedding = model.model.embed_tokens.weight.normal_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[ends] = 3 * embedding[now]
        model.lm_head.weight[now] = 3 * embedding[ends]
    return write_gguf(tmp_path / "turns.gguf", model, fields=fields)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("<|eot_id|>", {}),
        ("<|im_end|>", {}),
        ("<|end|>", {}),
        ("<end_of_turn>", {}),
        ("<odd>", {"eot_token_id": 257}),
        ("<odd>", {"eom_token_id": 257}),
    ],
)
def test_a_turn_ends(tmp_path, name, more):
    """In what is generated from the file, and in the converted checkpoint."""
    fields = small([name]) | {f"{GGML}.{key}": token for key, token in more.items()}
    fields[f"{GGML}.merges"] = ["Ġ 1"]
    fields[f"{GGML}.tokens"] += ["Ġ1"]
    fields[f"{GGML}.token_type"] += [NORMAL]
    path = turns(tmp_path, fields, 257)
    assert answer(td.load(path), "t", max_new_tokens=5).ids == (257,)
    td.convert(path, tmp_path / "out", td.Plan(2, [[0, 1]]))
    defaults = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert defaults["eos_token_id"] == [0, 257]
    assert answer(td.load(tmp_path / "out"), "t", max_new_tokens=5).ids == (257,)
    assert td.open_source(path).tokenizer.eos_token == "<end>"


@pytest.mark.parametrize("fields", [byte_level("tekken"), sentencepiece()], ids=["bytes", "pieces"])
def test_the_tokenizer_of_a_converted_checkpoint(tmp_path, fields):
    """Loads anywhere without a question, and gives the same ids."""
    source = td.open_source(write_vocabulary(tmp_path / "m.gguf", fields))
    source.save_companions(tmp_path)
    held = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert held["tokenizer_class"] == "PreTrainedTokenizerFast"
    found = texts(tuple(SPECIAL), count=600)
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = loader.from_pretrained(tmp_path)
        assert tokenizer(found)["input_ids"] == source.tokenizer(found)["input_ids"]


def test_every_name_of_a_split_is_read_or_refused():
    assert not WORDS.keys() & REFUSED.keys() and len(WORDS) > 80
