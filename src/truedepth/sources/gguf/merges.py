"""Merges of a GGUF file's tokenizer, as `tokenizers` wants them and llama.cpp applies them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf import Keys

from truedepth.errors import TruedepthError
from truedepth.sources.gguf.vocabulary import Vocabulary

Pair = tuple[str, str]


@dataclass(frozen=True)
class ByteMerges:
    """The merges of byte-level BPE."""

    pairs: list[Pair]
    """In the order in which they are applied."""

    missing: list[str]
    """The bytes, as byte-level BPE writes them, for which there is no token."""


def bpe_merges(tokens: Vocabulary, lines: list[str], whole: bool) -> ByteMerges:
    """The merges of byte-level BPE that can take place.

    Args:
        tokens: The vocabulary.
        lines: The merges, each as two parts with a space between them.
        whole: Whether a word that is a token is taken whole.

    Raises:
        TruedepthError: There are none, or one leads to or from something that is no token.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    if not lines:
        raise TruedepthError(
            f"{tokens.path} has no merges ({Keys.Tokenizer.MERGES}), without which its tokens"
            " cannot be found; give the original checkpoint."
        )
    pairs: dict[Pair, None] = {}
    for line in lines:
        space = line.find(" ", 1)
        if space > 0:  # llama.cpp takes others for a merge of nothing
            pairs.setdefault((line[:space], line[space + 1 :]))
    alphabet = {*ByteLevel.alphabet()}
    reached, possible = {*alphabet}, [*pairs]
    while possible:
        left = [pair for pair in possible if not {*pair} <= reached]
        reached |= {"".join(pair) for pair in possible if {*pair} <= reached}
        if len(left) == len(possible):
            break
        possible = left
    unreached = {*possible}
    kept = [pair for pair in pairs if pair not in unreached]
    for first, second in kept:
        for part in (first, second, first + second):
            if part not in tokens.ids:
                raise TruedepthError(
                    f"{tokens.path} merges {first!r} and {second!r}, but has no token {part!r};"
                    " give the original checkpoint."
                )
    missing = sorted(alphabet - tokens.ids.keys())
    if whole and missing:
        for name in tokens.names:
            if {*name} <= alphabet and {*name} & {*missing}:
                raise TruedepthError(
                    f"{tokens.path} has the token {name!r}, but none for a byte in it; give the"
                    " original checkpoint."
                )
    return ByteMerges(kept, missing)


def sentencepiece_merges(tokens: Vocabulary, scores: list[Any]) -> list[Pair]:
    """The merges that SentencePiece's BPE amounts to, in the order in which they are applied.

    Any two neighbours are merged that give a token, those of the highest score first, and the
    leftmost of those that give the same token.

    Raises:
        TruedepthError: `tokenizers` cannot merge in the same order, or the bytes of unknown
            characters have no tokens.
    """
    if len(scores) < len(tokens.names):
        raise TruedepthError(
            f"{tokens.path} gives {len(scores)} scores for {len(tokens.names)} tokens."
        )
    for byte in range(256):
        if f"<0x{byte:02X}>" not in tokens.ids:
            raise TruedepthError(
                f"{tokens.path} has no token '<0x{byte:02X}>' for a byte of unknown characters;"
                " llama.cpp stops at such a byte. Give the original checkpoint."
            )
    score = dict(zip(tokens.names, scores, strict=False))
    parts = _parts(tokens)
    for name, pairs in parts.items():
        if math.isnan(score[name]):
            raise TruedepthError(f"{tokens.path} gives no number as the score of {name!r}.")
        lost = [part for pair in pairs for part in pair if part not in tokens.ids]
        if lost and not _never_in_text(tokens, name):
            raise TruedepthError(
                f"{tokens.path} has the token {name!r}, but none for {lost[0]!r} in it, which"
                " tokenizers cannot merge; give the original checkpoint."
            )
    _check_order(tokens, parts, score)
    ranked = sorted(parts, key=lambda name: (-score[name], tokens.ids[name]))
    return [pair for name in ranked for pair in parts[name] if {*pair} <= tokens.ids.keys()]


def _parts(tokens: Vocabulary) -> dict[str, list[Pair]]:
    """The pairs of neighbours that give each token, for tokens that texts can lead to."""
    parts: dict[str, list[Pair]] = {}
    for name in sorted(tokens.names, key=len):
        if " " in name:  # spaces are written otherwise before anything is merged
            continue
        found = [
            (name[:at], name[at:])
            for at in range(1, len(name))
            if (at == 1 or name[:at] in parts) and (at == len(name) - 1 or name[at:] in parts)
        ]
        if found:
            parts[name] = found
    return parts


def _check_order(tokens: Vocabulary, parts: dict[str, list[Pair]], score: dict[str, float]) -> None:
    """Raise TruedepthError if tokens of one score compete: llama.cpp merges the leftmost first."""
    alike = defaultdict(list)
    for name in parts:
        if not _never_in_text(tokens, name):
            alike[score[name]].append(name)
    for value, names in alike.items():
        if len(names) > 1 and (rivals := next(_rivals(names, parts, score), None)):
            raise TruedepthError(
                f"{tokens.path} gives the tokens {rivals[0]!r} and {rivals[1]!r} one score,"
                f" {value:g}, so that it is lost in what order they were merged; give the original"
                " checkpoint, or a file that was made with its tokenizer.model."
            )


def _never_in_text(tokens: Vocabulary, name: str) -> bool:
    """Whether a token is always found before a text is split, so that nothing is merged to it."""
    return tokens.special(tokens.ids[name]) and "▁" not in name


def _rivals(
    names: list[str], parts: dict[str, list[Pair]], score: dict[str, float]
) -> Iterator[Pair]:
    """Pairs of tokens of one score whose order may matter.

    Both want the same neighbour, or one goes on to a token of no lower score, which may take a
    neighbour from the other.
    """
    begin, end = defaultdict(set), defaultdict(set)
    for name in names:
        for left, right in parts[name]:
            begin[left].add(name)
            end[right].add(name)
    for symbol in begin.keys() & end.keys():
        for one in begin[symbol]:
            for other in end[symbol] - {one}:
                yield one, other
    group = {*names}
    for name, pairs in parts.items():
        for part in {part for pair in pairs for part in pair} & group:
            if score[name] >= score[part]:
                yield part, name
