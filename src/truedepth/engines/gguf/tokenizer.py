"""Writes a tokenizer into the metadata of a GGUF file.

Two of llama.cpp's tokenizer models matter here: byte-level BPE (`gpt2`), whose way of splitting
text into words llama.cpp knows by name, and SentencePiece's BPE (`llama`), which merges by scores.
The original tokenizer.json is stored as well, unchanged, for programs that can use it.

llama.cpp differs in small ways with any GGUF file: it does not normalize text (Qwen2's NFC), it
splits some words otherwise than published tokenizers (`sources/gguf/words.py`), and if a
SentencePiece tokenizer puts a space before a text, llama.cpp puts one after special tokens too.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, Keys, TokenType

from truedepth.errors import TruedepthError
from truedepth.progress import note
from truedepth.runtime.empty import transformers_config
from truedepth.sources.gguf.merges import gaps
from truedepth.sources.gguf.vocabulary import ENDS
from truedepth.sources.gguf.words import GPT2, canonical, name_of
from truedepth.sources.limits import read_json
from truedepth.sources.source import Source
from truedepth.text import beginning

SPACE = "▁"


def check_tokenizer(source: Source) -> None:
    """Check that llama.cpp has the tokenizer.

    Raises:
        TruedepthError: llama.cpp is not known to have it, or no token ends a text.
    """
    _kind(source, _definition(source))
    special = _special(source)
    names = _names(source)
    for token in _other_ends(source, special["eos"]):
        if token not in special.values() and names[token] not in ENDS:
            note(
                f"{source.path} also ends texts with token {token} ({names[token]!r}), for which"
                " llama.cpp has no place; there it does not."
            )


def add_tokenizer(writer: GGUFWriter, source: Source) -> None:
    """Add vocabulary, merges, special tokens and chat template to the file's metadata.

    Raises:
        TruedepthError: llama.cpp is not known to have the tokenizer, or no token ends a text.
    """
    tokenizer, definition = source.tokenizer, _definition(source)
    model, words = _kind(source, definition)
    merges = [
        tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)
        for merge in definition["model"]["merges"]
    ]
    names, types = _tokens(source, definition, byte_tokens=model == "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(words)
    writer.add_token_list(names)
    writer.add_token_types(types)
    if model == "gpt2":
        # A space within a token is written as byte-level BPE writes spaces.
        writer.add_token_merges(
            [" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges]
        )
    else:
        ranks = {
            left + right: -float(rank) for rank, (left, right) in reversed([*enumerate(merges)])
        }
        writer.add_token_scores([ranks.get(name, -1e6) for name in names])
        writer.add_add_space_prefix(_begins_with_space(definition))
    for name, token in _special(source).items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(bool(beginning(tokenizer)))
    ids = tokenizer("x")["input_ids"]
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if template := tokenizer.chat_template:
        named = (
            template
            if isinstance(template, str)
            else [{"name": name, "template": text} for name, text in template.items()]
        )
        writer.add_chat_template(named)
    writer.add_string(Keys.Tokenizer.HF_JSON, json.dumps(definition, ensure_ascii=False))


def _definition(source: Source) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    backend = getattr(source.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TruedepthError(
            f"{source.path} has no fast tokenizer (tokenizer.json), which export needs."
        )
    found: dict[str, Any] = json.loads(backend.to_str())
    return found


def _kind(source: Source, definition: dict[str, Any]) -> tuple[str, str]:
    """llama.cpp's names for the tokenizer's model and its way of splitting text into words."""
    steps = _steps(definition.get("pre_tokenizer"))
    refused = TruedepthError(
        f"The tokenizer of {source.path} cannot be exported: llama.cpp is only known to have"
        f" byte-level BPE that splits words like {', '.join(canonical())}, and SentencePiece's BPE."
    )
    model, normalizers = definition["model"], _steps(definition.get("normalizer"))
    kinds = {step["type"] for step in steps}
    if model["type"] != "BPE":
        raise refused
    if model.get("byte_fallback"):
        spaces = [step for step in normalizers if step["type"] in ("Prepend", "Replace")]
        if kinds - {"Metaspace"} or spaces != normalizers:
            raise refused
        return "llama", "default"
    if steps and steps[-1].get("pattern") == {"Regex": gaps(model["vocab"])}:
        steps.pop()  # as a GGUF file was read; llama.cpp does it by itself
    *before, last = steps or [{}]
    if (
        last.get("type") != "ByteLevel"
        or last.get("add_prefix_space")
        or {step["type"] for step in normalizers} - {"NFC"}
    ):
        raise refused
    patterns = (*map(_pattern, before), *([GPT2] if last.get("use_regex", True) else []))
    if name := name_of(patterns, bool(model.get("ignore_merges"))):
        return "gpt2", name
    raise refused


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer, with nested sequences flattened."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers") or part.get("normalizers") or []
        return [step for each in inner for step in _steps(each)]
    return [part]


def _pattern(step: dict[str, Any]) -> str:
    if step["type"] == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return str(step["type"])


def _special(source: Source) -> dict[str, int]:
    """Special tokens by name, from the tokenizer, else from the model's config.

    Raises:
        TruedepthError: No token ends a text; llama.cpp would use an ordinary one instead.
    """
    config = transformers_config(source.config, source.path)
    found = {}
    for name in ("bos", "eos", "unk", "sep", "pad"):
        token = getattr(source.tokenizer, f"{name}_token_id", None)
        if token is None:
            token = getattr(config, f"{name}_token_id", None)
        if isinstance(token, list):
            token = token[0] if token else None
        if token is not None and 0 <= token < config.vocab_size:
            found[name] = int(token)
    if "eos" not in found:
        raise TruedepthError(
            f"Neither tokenizer nor config of {source.path} names the token that ends a text"
            " (eos_token); add it to tokenizer_config.json."
        )
    names, others = _names(source), _other_ends(source, found["eos"])
    # llama.cpp has two places for others, and finds those of usual names by itself.
    found |= zip(
        ("eot", "eom"), [token for token in others if names[token] not in ENDS], strict=False
    )
    for token in others:
        if names[token] in ENDS:
            found.setdefault("eom" if names[token] == "<|eom_id|>" else "eot", token)
    return found


def _names(source: Source) -> dict[int, str]:
    return {index: name for name, index in source.tokenizer.get_vocab().items()}


def _other_ends(source: Source, eos: int) -> list[int]:
    """Tokens besides EOS that end a text or a turn."""
    defaults = source.path / "generation_config.json"
    held = read_json(defaults, f"{source.path} has no") if defaults.exists() else {}
    names = _names(source)
    ends: dict[Any, None] = {}
    for said in (held.get("eos_token_id"), source.config.get("eos_token_id")):
        ends |= dict.fromkeys(said if isinstance(said, list) else [said])
    return [token for token in ends if token in names and token != eos]


def _tokens(
    source: Source, definition: dict[str, Any], *, byte_tokens: bool
) -> tuple[list[str], list[TokenType]]:
    """Names and types of all tokens that the model embeds; ids without a name are marked unused."""
    added = {token["id"]: token for token in definition["added_tokens"]}
    by_id = {index: name for name, index in source.tokenizer.get_vocab().items()}
    unknown = source.tokenizer.unk_token_id
    names, types = [], []
    for index in range(transformers_config(source.config, source.path).vocab_size):
        name, kind = by_id.get(index), TokenType.NORMAL
        if name is None:
            name, kind = f"[PAD{index}]", TokenType.UNUSED
        elif index == unknown and byte_tokens:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
            name = name if added[index]["special"] else name.replace(SPACE, " ")
        elif byte_tokens and len(name) == 6 and name.startswith("<0x"):
            kind = TokenType.BYTE
        names.append(name)
        types.append(kind)
    return names, types


def _begins_with_space(definition: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text."""
    steps = _steps(definition.get("pre_tokenizer"))
    if any(step["type"] == "Metaspace" for step in steps):
        return all(step.get("prepend_scheme", "always") != "never" for step in steps)
    return any(step["type"] == "Prepend" for step in _steps(definition.get("normalizer")))
