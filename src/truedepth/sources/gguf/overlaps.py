"""Special tokens that overlap in a text: which of them is taken.

llama.cpp looks for the longest token in the whole text, then for the next longest in what is left.
`tokenizers` goes from left to right and takes the longest that begins where it is.
"""

from __future__ import annotations

from collections import defaultdict


def found_otherwise(names: list[str]) -> str | None:
    """The shortest text of two overlapping tokens in which the two ways find different tokens."""
    beginnings = defaultdict(list)
    for name in names:
        for size in range(1, len(name)):
            beginnings[name[:size]].append(name)
    texts = {
        name + other[size:]
        for name in names
        for size in range(1, len(name))
        for other in beginnings.get(name[-size:], ())
    }
    for text in sorted(texts, key=lambda text: (len(text), text)):
        inside = [name for name in names if name in text]
        if _longest_first(text, inside) != _from_left(text, inside):
            return text
    return None


def _longest_first(text: str, names: list[str]) -> list[str]:
    pieces = [(text, False)]
    for name in sorted(names, key=lambda name: -len(name.encode())):
        cut = []
        for piece, found in pieces:
            if found:
                cut.append((piece, True))
                continue
            for number, part in enumerate(piece.split(name)):
                cut += [(name, True)] * (number > 0) + [(part, False)] * bool(part)
        pieces = cut
    return [piece for piece, _ in pieces]


def _from_left(text: str, names: list[str]) -> list[str]:
    pieces, start, at = [], 0, 0
    while at < len(text):
        here = [name for name in names if text.startswith(name, at)]
        if not here:
            at += 1
            continue
        found = max(here, key=len)
        pieces += [text[start:at]] * (start < at) + [found]
        start = at = at + len(found)
    return pieces + [text[start:]] * (start < at)
