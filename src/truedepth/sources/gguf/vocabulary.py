"""The vocabulary of a GGUF file: its tokens, what they are for, and which of them end a text.

All of it as llama.cpp has it after loading a file (llama_vocab::impl::load in src/llama-vocab.cpp):
it also goes by the names of tokens, where metadata are missing or of the wrong kind.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import Keys, TokenType

from truedepth.errors import TruedepthError
from truedepth.sources.gguf.reader import value

MODELS = ("gpt2", "llama")
"""Kinds of tokenizer (`tokenizer.ggml.model`) that are read: byte-level and SentencePiece's BPE."""

ROLES = {
    "bos": (Keys.Tokenizer.BOS_ID,),
    "eos": (Keys.Tokenizer.EOS_ID,),
    "eot": (Keys.Tokenizer.EOT_ID,),
    "eom": (Keys.Tokenizer.EOM_ID,),
    "unk": (Keys.Tokenizer.UNK_ID,),
    "sep": (Keys.Tokenizer.SEP_ID,),
    "pad": (Keys.Tokenizer.PAD_ID,),
    "mask": (Keys.Tokenizer.MASK_ID,),
    "fim_pre": (Keys.Tokenizer.PREFIX_ID, Keys.Tokenizer.FIM_PRE_ID),
    "fim_suf": (Keys.Tokenizer.SUFFIX_ID, Keys.Tokenizer.FIM_SUF_ID),
    "fim_mid": (Keys.Tokenizer.MIDDLE_ID, Keys.Tokenizer.FIM_MID_ID),
    "fim_pad": (Keys.Tokenizer.FIM_PAD_ID,),
    "fim_rep": (Keys.Tokenizer.FIM_REP_ID,),
    "fim_sep": (Keys.Tokenizer.FIM_SEP_ID,),
}
"""Metadata keys by what a token is for; where there are two, the first is the one that counts."""

SENTENCEPIECE_DEFAULTS = {"unk": 0, "bos": 1, "eos": 2}
"""Tokens of a SentencePiece file that does not name them. Byte-level files get none here: what
llama.cpp takes, token 11, is right for Falcon alone."""

FILLERS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE>"  # noqa: RUF001
    " <|code_prefix|> <|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF>"  # noqa: RUF001
    " <|code_suffix|> <|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID>"  # noqa: RUF001
    " <|code_middle|> <|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
"""Names of tokens by what they are for where no metadata say so."""

ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
    "<｜end▁of▁sentence｜>",  # noqa: RUF001
)
"""Names of tokens that end a text or a turn, whatever the metadata say."""

ALWAYS_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file."""

    path: Path
    model: str
    names: list[str]
    kinds: list[TokenType]
    ids: dict[str, int]
    roles: dict[str, int]
    """Token by what it is for: `bos`, `eos`, …; those that the file names or llama.cpp supposes."""

    ends: list[int]
    """Tokens that end a generated text, EOS first."""

    ignored: dict[str, int]
    """Metadata that name tokens that the file has not, and are passed over."""

    mended: list[str]
    """Names of tokens that the file does not mark as control tokens, but are."""

    def special(self, token: int) -> bool:
        """Whether a token's name is found in a text before the text is split."""
        return self.kinds[token] in (
            TokenType.CONTROL,
            TokenType.USER_DEFINED,
            TokenType.UNKNOWN,
        )


def read_vocabulary(path: Path, reader: gguf.GGUFReader) -> Vocabulary | None:
    """The vocabulary of a file, or None if it has none that is read here.

    Raises:
        TruedepthError: Its lists contradict each other.
    """
    model = value(reader, Keys.Tokenizer.MODEL)
    if model not in MODELS or Keys.Tokenizer.LIST not in reader.fields:
        return None
    names = [  # llama.cpp cuts names at a NUL
        name.split("\0", 1)[0] or f"[EMPTY_{index}]"
        for index, name in enumerate(strings(reader, "LIST"))
    ]
    ids: dict[str, int] = {}
    for index, name in enumerate(names):
        if ids.setdefault(name, index) != index:
            raise TruedepthError(
                f"{path} gives the tokens {ids[name]} and {index} one name, {name!r}; llama.cpp"
                " refuses such a file too, so convert the original model again."
            )
    kinds = [TokenType(kind) if 1 <= kind <= 6 else TokenType.NORMAL for kind in _kinds(reader)]
    if kinds and len(kinds) < len(names):
        raise TruedepthError(f"{path} gives {len(kinds)} token types for {len(names)} tokens.")
    kinds = kinds[: len(names)] or [TokenType.NORMAL] * len(names)
    roles, ignored = _roles(reader, len(names), SENTENCEPIECE_DEFAULTS if model == "llama" else {})
    marked = list(kinds)
    ends = _ends(names, ids, kinds, roles)
    mended = [names[i] for i, kind in enumerate(kinds) if kind is TokenType.CONTROL != marked[i]]
    return Vocabulary(path, model, names, kinds, ids, roles, ends, ignored, mended)


def strings(reader: gguf.GGUFReader, name: str) -> list[str]:
    """An array of strings from the metadata.

    Raises:
        TruedepthError: It is something else.
    """
    key = getattr(Keys.Tokenizer, name)
    found = value(reader, key, [])
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found[:1]):
        raise TruedepthError(f"The GGUF metadata {key!r} must be an array of strings.")
    return found


def numbers(reader: gguf.GGUFReader, name: str) -> list[Any]:
    """An array of numbers from the metadata.

    Raises:
        TruedepthError: It is something else.
    """
    key = getattr(Keys.Tokenizer, name)
    found = value(reader, key, [])
    if not isinstance(found, list) or not all(type(each) in (int, float) for each in found[:1]):
        raise TruedepthError(f"The GGUF metadata {key!r} must be an array of numbers.")
    return found


def flag(reader: gguf.GGUFReader, name: str, default: bool) -> bool:
    """A yes or no from the metadata.

    Raises:
        TruedepthError: It is something else.
    """
    key = getattr(Keys.Tokenizer, name)
    found = value(reader, key, default)
    if not isinstance(found, bool):
        raise TruedepthError(f"The GGUF metadata {key!r} is {reprlib.repr(found)}, not a boolean.")
    return found


def _kinds(reader: gguf.GGUFReader) -> list[int]:
    return [int(kind) for kind in numbers(reader, "TOKEN_TYPE")]


def _roles(
    reader: gguf.GGUFReader, tokens: int, defaults: dict[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens by what they are for, and what the metadata say of tokens that there are not."""
    roles = {role: token for role, token in defaults.items() if token < tokens}
    ignored = {}
    for role, keys in ROLES.items():
        for key in reversed(keys):
            if key not in reader.fields:
                continue
            token = value(reader, key)
            if type(token) is not int:
                raise TruedepthError(
                    f"The GGUF metadata {key!r} is {reprlib.repr(token)}, not the id of a token."
                )
            if 0 <= token < tokens:
                roles[role] = token
            else:
                ignored[key] = token
    return roles, ignored


def _ends(
    names: list[str], ids: dict[str, int], kinds: list[TokenType], roles: dict[str, int]
) -> list[int]:
    """The tokens that end a text; marks tokens by their names in `kinds`."""
    ends = {roles[role] for role in ("fim_pad", "fim_rep", "fim_sep") if role in roles}
    for role, known in FILLERS.items():
        # Where several are there, llama.cpp takes one of them, in no order that can be relied upon.
        found = [ids[name] for name in known.split() if role not in roles and name in ids]
        for token in found:
            kinds[token] = TokenType.CONTROL
        if role in ("fim_pad", "fim_rep", "fim_sep"):
            ends |= {*found}
    for name in ENDS:
        if name in ids:
            ends.add(ids[name])
            kinds[ids[name]] = TokenType.CONTROL
    for name in ALWAYS_TEXT:
        if name in ids:
            kinds[ids[name]] = TokenType.USER_DEFINED
    ends |= {roles[role] for role in ("eos", "eot", "eom") if role in roles}
    said = {names[token] for token in ends}
    calls = said & {"<|call|>", "<|calls|>"} and said & {"<|return|>", "<|flush|>"}
    if "<|end|>" in said and calls:
        ends.discard(ids["<|end|>"])
        kinds[ids["<|end|>"]] = TokenType.USER_DEFINED
    if "</s>" in said and said & {"<|tool_response>", "<|plamo:eos|>"}:
        ends.discard(ids["</s>"])
        kinds[ids["</s>"]] = TokenType.NORMAL
    first = roles.get("eos")
    return sorted(ends, key=lambda token: (token != first, token))
