"""Merges of byte-level BPE in a GGUF file: those that llama.cpp applies, for `tokenizers`."""

from __future__ import annotations

from collections.abc import Container

from gguf import Keys

from truedepth.errors import TruedepthError
from truedepth.sources.gguf.vocabulary import Vocabulary

Pair = tuple[str, str]


def gaps(tokens: Container[str]) -> str | None:
    """A pattern of the bytes, as byte-level BPE writes them, for which there are no tokens.

    SmolLM's vocabulary has 21 such. llama.cpp leaves them out of texts, and merges nothing over
    them. `tokenizers` would merge what is on either side.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    missing = sorted(byte for byte in ByteLevel.alphabet() if byte not in tokens)
    return "|".join(rf"\x{{{ord(byte):X}}}" for byte in missing) or None


def bpe_merges(tokens: Vocabulary, lines: list[str], whole: bool) -> list[Pair]:
    """The merges of byte-level BPE that can take place, in their order.

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
    return kept
