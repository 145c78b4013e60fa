"""SentencePiece's BPE in a GGUF file: scores of tokens -> merges in the order that they ask for.

llama.cpp and SentencePiece merge any two neighbours that give a token: those of the highest score
first, and of those of one score the leftmost. `tokenizers` has a rank for every pair, and goes by
place only among pairs of one rank. So where tokens share a score (in Llama 2 and Mistral, the runs
of spaces) it is looked whether both ways give the same tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from truedepth.errors import TruedepthError
from truedepth.sources.gguf.merges import Pair
from truedepth.sources.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers.models import BPE

MAX_DOUBTS = 2000

Parts = dict[str, list[Pair]]
"""The pairs of neighbours that give each token, for tokens that texts can lead to."""


def piece_model(tokens: Vocabulary, scores: list[Any]) -> BPE:
    """The merges of SentencePiece's BPE as a model of `tokenizers`.

    Raises:
        TruedepthError: `tokenizers` cannot merge in the same order, or the bytes of unknown
            characters have no tokens.
    """
    from tokenizers import models

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
    # Of one score the longest first: what has grown on the left goes on growing, as in llama.cpp.
    ranked = sorted(parts, key=lambda name: (-score[name], -len(name), tokens.ids[name]))
    unknown = tokens.roles.get("unk")
    model = models.BPE(
        tokens.ids,
        [pair for name in ranked for pair in parts[name] if {*pair} <= tokens.ids.keys()],
        unk_token=None if unknown is None else tokens.names[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    _check_order(tokens, parts, score, model)
    return model


def _parts(tokens: Vocabulary) -> Parts:
    parts: Parts = {}
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


def _never_in_text(tokens: Vocabulary, name: str) -> bool:
    """Whether a token is always found before a text is split, so that nothing is merged to it."""
    return tokens.special(tokens.ids[name]) and "▁" not in name


def _check_order(tokens: Vocabulary, parts: Parts, score: dict[str, float], model: BPE) -> None:
    """Raise TruedepthError if texts are found in which tokens of one score are merged otherwise."""
    alike = defaultdict(list)
    for name in parts:
        if not _never_in_text(tokens, name):
            alike[score[name]].append(name)
    for value, names in alike.items():
        if len(names) == 1:
            continue
        for one, other in islice(_rivals(names, parts, score), MAX_DOUBTS):
            for text in _doubtful(one, other):
                if [token.value for token in model.tokenize(text)] != _leftmost(text, score):
                    raise TruedepthError(
                        f"{tokens.path} gives the tokens {one!r} and {other!r} one score,"
                        f" {value:g}, so that it is lost in what order they were merged; give the"
                        " original checkpoint, or a file that was made with its tokenizer.model."
                    )


def _rivals(names: list[str], parts: Parts, score: dict[str, float]) -> Iterator[Pair]:
    """Pairs of tokens of one score whose order may matter.

    Both want the same neighbour, or one goes on to a token of no lower score, which may take a
    neighbour from the other.
    """
    begin, end = defaultdict(set), defaultdict(set)
    for name in names:
        for left, right in parts[name]:
            begin[left].add(name)
            end[right].add(name)
    for symbol in sorted(begin.keys() & end.keys()):
        for one in sorted(end[symbol]):
            for other in sorted(begin[symbol] - {one}):
                yield one, other
    group = {*names}
    for name, pairs in parts.items():
        for part in sorted({part for pair in pairs for part in pair} & group):
            if score[name] >= score[part]:
                yield part, name


def _doubtful(one: str, other: str) -> Iterator[str]:
    """Texts in which two tokens meet: side by side, and overlapping in every way."""
    yield from (one + other, other + one, one + one + other, one + other + other)
    for first, second in ((one, other), (other, one)):
        for size in range(1, min(len(first), len(second))):
            if first.endswith(second[:size]):
                yield first + second[size:]


def _leftmost(text: str, score: dict[str, float]) -> list[str]:
    """A text merged as llama.cpp merges it; one by one, so only for short texts."""
    symbols = [*text]
    while True:
        found = [
            (-score[left + right], at)
            for at, (left, right) in enumerate(pairwise(symbols))
            if left + right in score
        ]
        if not found:
            return symbols
        _, at = min(found)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
