"""The tokenizer of a GGUF file, built from its metadata to give llama.cpp's token ids.

transformers' own loader of GGUF files (5.23) knows the splits of few models, and passes over most
other metadata. A file whose ids cannot be given is refused by name.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from gguf import Keys, TokenType

from truedepth.errors import TruedepthError
from truedepth.progress import note
from truedepth.sources.gguf.merges import bpe_merges, gaps
from truedepth.sources.gguf.overlaps import found_otherwise
from truedepth.sources.gguf.pieces import piece_model
from truedepth.sources.gguf.reader import value
from truedepth.sources.gguf.vocabulary import MODELS, Vocabulary, flag, numbers, strings
from truedepth.sources.gguf.words import REFUSED, WORDS, Words

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"

NO_TOKENIZER = (None, "none", "no_vocab")
"""What `tokenizer.ggml.model` says in a file without a tokenizer."""

UNREAD = {
    Keys.Tokenizer.REMOVE_EXTRA_WS: "takes out white space",
    Keys.Tokenizer.PRECOMPILED_CHARSMAP: "replaces characters",
    "tokenizer.ggml.normalizer.lowercase": "makes letters small",
    "tokenizer.ggml.normalizer.strip_accents": "takes off accents",
    "tokenizer.ggml.suppress_tokens": "keeps tokens from being generated",
}
"""Metadata for tokenizers of other models, and what they ask for."""


def check_tokenizer(path: Path, reader: gguf.GGUFReader, tokens: Vocabulary | None) -> None:
    """Check, without building it, that a file's tokenizer is one that is read.

    Raises:
        TruedepthError: It is not; the metadata that say so are named.
    """
    model = value(reader, Keys.Tokenizer.MODEL)
    if model in NO_TOKENIZER or Keys.Tokenizer.LIST not in reader.fields:
        raise TruedepthError(
            f"{path} has no tokenizer (the metadata {Keys.Tokenizer.MODEL!r} and"
            f" {Keys.Tokenizer.LIST!r}); give a file that has one."
        )
    if tokens is None:
        raise TruedepthError(
            f"{path} has a tokenizer of the kind {reprlib.repr(model)} ({Keys.Tokenizer.MODEL}),"
            f" which is not read; known: {', '.join(MODELS)}. Give the original checkpoint."
        )
    for key, effect in UNREAD.items():
        if value(reader, key):
            raise TruedepthError(
                f"{path} asks for a step that is not known here: the metadata {key!r} {effect}."
                " Give the original checkpoint."
            )
    _words(path, reader)
    if model == "llama" and not numbers(reader, "SCORES"):
        raise TruedepthError(
            f"{path} gives no scores of its tokens ({Keys.Tokenizer.SCORES}), which say in what"
            " order they are merged; give the original checkpoint."
        )
    for role in ("bos", "eos"):
        if flag(reader, f"ADD_{role.upper()}", False) and role not in tokens.roles:
            raise TruedepthError(
                f"{path} puts {role.upper()} into every text (tokenizer.ggml.add_{role}_token), but"
                f" names no such token (tokenizer.ggml.{role}_token_id); give the original"
                " checkpoint."
            )


def build_tokenizer(
    path: Path, reader: gguf.GGUFReader, tokens: Vocabulary
) -> PreTrainedTokenizerBase:
    """The tokenizer of a file, as transformers has tokenizers.

    What had to be decided is said on standard error.

    Raises:
        TruedepthError: `tokenizers` cannot give llama.cpp's token ids.
    """
    from transformers import PreTrainedTokenizerFast

    words = _words(path, reader)
    begins = words.begins if words else True
    bos = tokens.roles.get("bos") if flag(reader, "ADD_BOS", begins) else None
    eos = tokens.roles.get("eos") if flag(reader, "ADD_EOS", False) else None
    backend = _byte_level(tokens, reader, words) if words else _sentencepiece(tokens, reader)
    _add_special(backend, tokens, str(value(reader, "general.name", "")))
    _add_template(backend, tokens, bos, eos)
    _say(tokens, reader, begins)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat_templates(path, reader),
        clean_up_tokenization_spaces=False,
        **_named(backend, tokens),
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a tokenizer to a directory, under the name of class that every release knows."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    held["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def chat_templates(path: Path, reader: gguf.GGUFReader) -> str | dict[str, str] | None:
    """The chat template, or all of them by name.

    Raises:
        TruedepthError: One of them is named but not there, or is no text.
    """
    first = Keys.Tokenizer.CHAT_TEMPLATE
    keys = {key.removeprefix(f"{first}."): key for key in reader.fields if f"{first}." in key}
    for name in strings(reader, "CHAT_TEMPLATES"):
        keys.setdefault(name, Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name))
    if first in reader.fields:
        keys["default"] = first
    templates = {name: value(reader, key) for name, key in keys.items()}
    for name, template in templates.items():
        if not isinstance(template, str):
            raise TruedepthError(
                f"{path} names a chat template {name!r}, but the metadata {keys[name]!r} hold"
                f" {'none' if template is None else 'no text'}."
            )
    if templates.keys() <= {"default"}:
        return templates.get("default")
    return templates


def _words(path: Path, reader: gguf.GGUFReader) -> Words | None:
    """How byte-level BPE splits text; None for SentencePiece, which does not."""
    name = value(reader, Keys.Tokenizer.PRE) or "default"
    if name not in WORDS:
        reason = REFUSED.get(name, "not one that llama.cpp is known to have")
        raise TruedepthError(
            f"{path} splits text by {reprlib.repr(name)} ({Keys.Tokenizer.PRE}), which is not read:"
            f" {reason}. Give the original checkpoint."
        )
    if value(reader, Keys.Tokenizer.MODEL) == "llama":
        return None
    return WORDS[name]


def _byte_level(tokens: Vocabulary, reader: gguf.GGUFReader, words: Words) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = bpe_merges(tokens, strings(reader, "MERGES"), words.whole)
    backend = Tokenizer(models.BPE(tokens.ids, merges, ignore_merges=words.whole))
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if missing := gaps(tokens.ids):
        steps.append(pre_tokenizers.Split(Regex(missing), "removed"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if flag(reader, "ADD_PREFIX", False):
        note(
            f"{tokens.path} asks for a space before every text ({Keys.Tokenizer.ADD_PREFIX}), which"
            " llama.cpp does not put before bytes; nor is it here."
        )
    return backend


def _sentencepiece(tokens: Vocabulary, reader: gguf.GGUFReader) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers

    backend = Tokenizer(piece_model(tokens, numbers(reader, "SCORES")))
    begin = flag(reader, "ADD_PREFIX", True)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE)] * begin + [normalizers.Replace(" ", SPACE)]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * begin
    )
    return backend


def _add_special(backend: Tokenizer, tokens: Vocabulary, model_name: str) -> None:
    """Tokens whose names are found in a text before it is split."""
    from tokenizers import AddedToken

    phi3 = any(name in model_name.lower() for name in ("phi-3", "phi3"))
    special = [name for token, name in enumerate(tokens.names) if tokens.special(token)]
    text: list[AddedToken] = []
    control: list[AddedToken] = []
    for name in special:
        strip = phi3 and name not in ("<unk>", "<s>", "<|endoftext|>")
        into = text if tokens.kinds[tokens.ids[name]] is TokenType.USER_DEFINED else control
        into.append(AddedToken(name, rstrip=strip, normalized=False, special=into is control))
    backend.add_special_tokens(control)
    backend.add_tokens(text)
    if phi3:
        note(
            f"{tokens.path} is a Phi-3 by its name, so white space after special tokens is left"
            " out, here also beyond ASCII."
        )
    if overlap := found_otherwise(special):
        note(
            f"{tokens.path} has special tokens that overlap, as in {overlap!r}; the one that begins"
            " first is taken, where llama.cpp takes the longest."
        )


def _add_template(backend: Tokenizer, tokens: Vocabulary, bos: int | None, eos: int | None) -> None:
    """Tokens before and after every text."""
    from tokenizers import processors

    ends = {"bos": bos, "eos": eos}
    given = {name: token for name, token in ends.items() if token is not None}
    if given:
        one = [*(["bos"] if "bos" in given else []), "$A", *(["eos"] if "eos" in given else [])]
        backend.post_processor = processors.TemplateProcessing(
            single=one,
            pair=[*one, *(f"{part.replace('$A', '$B')}:1" for part in one)],
            special_tokens=[
                {"id": name, "ids": [token], "tokens": [tokens.names[token]]}
                for name, token in given.items()
            ],
        )


def _named(backend: Tokenizer, tokens: Vocabulary) -> dict[str, str]:
    """The tokens that transformers knows by what they are for.

    It looks for their names in every text. A token that is also an ordinary part of texts ("!" for
    padding) must therefore stay without.
    """
    named = {}
    for role in ("bos", "eos", "unk", "sep", "pad", "mask"):
        if (token := tokens.roles.get(role)) is None:
            continue
        name = tokens.names[token]
        if not tokens.special(token):
            if token in backend.encode(name, add_special_tokens=False).ids:
                continue
            if role not in ("bos", "eos"):
                continue
            note(
                f"{tokens.path} does not mark its {role.upper()} token {token} ({name!r}) as a"
                " control token; here it is one."
            )
        named[f"{role}_token"] = name
    return named


def _say(tokens: Vocabulary, reader: gguf.GGUFReader, begins: bool) -> None:
    """Say what was decided about odd metadata."""
    path = tokens.path
    if not value(reader, Keys.Tokenizer.PRE) and tokens.model == "gpt2":
        note(
            f"{path} does not say how text is split ({Keys.Tokenizer.PRE}); it is split as"
            " llama.cpp does then, by 'default'."
        )
    for key, token in tokens.ignored.items():
        note(f"{path} has no token {token}, which it gives as {key!r}; that is passed over.")
    if tokens.mended:
        note(
            f"{path} does not mark {reprlib.repr(tokens.mended)} as control tokens, but they are"
            " by their names, as for llama.cpp."
        )
    if begins and "bos" not in tokens.roles and Keys.Tokenizer.ADD_BOS not in reader.fields:
        note(
            f"{path} begins texts with BOS by its split, but names no such token; they begin"
            " without, where llama.cpp takes token 11."
        )
