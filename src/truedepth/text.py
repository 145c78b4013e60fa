"""Text to measure on, and how it is cut into windows of tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truedepth.errors import TruedepthError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truedepth.sources.source import Source

TEXT_SUFFIXES = (".txt", ".jsonl")

WINDOW = 512
"""Tokens per window, where nothing else is said and the model has as many positions."""

STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rotary embeddings that extend a model's positions by a factor."""

DEFAULT_TEXT = "Python documentation topics (pydoc_data.topics)"


def default_text() -> str:
    """Technical prose and code that ships with every Python, so that measuring works offline.

    It differs between versions of Python; compare figures within one version only.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """A file's `documents` as one text, with an empty line between them.

    Raises:
        TruedepthError: See `documents`.
    """
    return "\n\n".join(documents(path))


def read_lines(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers.

    Args:
        path: The file.
        what: What it is called in errors, such as `the task file`.

    Raises:
        TruedepthError: It cannot be read, or a line is no UTF-8.
    """
    with _reading(path, what):
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def documents(path: str | Path) -> Iterator[str]:
    """The whole of a `.txt` file, or the text of each `{"text": …}` line of a `.jsonl` file.

    Raises:
        TruedepthError: The file is missing, of another kind, malformed (the line is named), or
            empty.
    """
    path = Path(path).expanduser()
    if path.suffix not in TEXT_SUFFIXES:
        raise TruedepthError(
            f"{path} is neither a .txt nor a .jsonl file; save the text as one of these."
        )
    check_characters(str(path), f"The name of the text {path}")  # checkpoints record it
    empty = True
    with _reading(path, "the text"), path.open(encoding="utf-8-sig") as file:
        lines = enumerate(file, 1) if path.suffix == ".jsonl" else [(0, file.read())]
        for number, line in lines:
            if line.strip():
                document = _document(line, path, number) if number else _plain(line, path)
                empty = empty and not document.strip()
                yield document
    if empty:
        raise TruedepthError(f"{path} is empty; give a file with text.")


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Say in a sentence why a file cannot be read."""
    try:
        yield
    except OSError as error:
        raise TruedepthError(f"Cannot read {what} {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        number = undecodable_line(path)
        raise TruedepthError(
            f"Line {number} of {path} is not UTF-8 text; save the file as UTF-8."
        ) from error


def undecodable_line(path: Path) -> int:
    """The number of the first line of a file that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1  # the file has changed since it was read


def _plain(text: str, path: Path) -> str:
    if text.count("\0") > len(text) // 4:
        raise TruedepthError(f"{path} looks like UTF-16, not like UTF-8; save it as UTF-8.")
    return text


def _document(line: str, path: Path, number: int) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TruedepthError(f"Line {number} of {path} is not valid JSON.") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise TruedepthError(f"Line {number} of {path} must be an object with a string 'text'.")
    check_characters(document["text"], f"Line {number} of {path}")
    return str(document["text"])


def check_characters(text: str, what: str) -> None:
    """Refuse text that has no UTF-8: half a surrogate pair, or a byte passed on by the shell.

    Raises:
        TruedepthError: The text holds such a character; `what` begins the sentence.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        held = f"half of a character, \\u{code:04x}, as its character {error.start + 1}"
        if 0xDC80 <= code <= 0xDCFF:  # how Python passes on bytes that are not UTF-8
            held = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
        raise TruedepthError(f"{what} holds {held}; take it out.") from error


def token_ids(source: Source, texts: Sequence[str], what: str = "The text") -> list[list[int]]:
    """The tokens of some texts, without those that a tokenizer puts around a text.

    Args:
        source: The model whose tokenizer is used.
        texts: The texts.
        what: What they are; it begins the sentence of an error.

    Raises:
        TruedepthError: A text is no UTF-8, or the tokenizer fails.
    """
    for text in texts:
        check_characters(text, what)
    tokenizer = source.tokenizer
    try:
        found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    except Exception as error:  # tokenizers of every kind raise errors of every kind
        raise TruedepthError(
            f"The tokenizer of {source.name} cannot split the text: {reason_of(error)}"
        ) from error
    return found


def check_embedded(source: Source, ids: Iterable[int]) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        TruedepthError: A token's id is not below the config's `vocab_size`, or there is no id.
    """
    rows = source.config.get("vocab_size")
    try:
        highest = max(ids, default=-1)
    except TypeError as error:  # some tokenizers give None for what they do not know
        raise TruedepthError(
            f"The tokenizer of {source.name} has no token for a part of the text, nor one for"
            " whatever is unknown; use the tokenizer that belongs to the model."
        ) from error
    if rows is not None and highest >= rows:
        token = source.tokenizer.convert_ids_to_tokens(highest)
        raise TruedepthError(
            f"The tokenizer of {source.name} gives {token!r} the id {highest}, and the model has"
            f" embeddings for {rows} tokens, the last with the id {rows - 1}; use the tokenizer"
            " that belongs to the model, or text without this token."
        )


def token_windows(source: Source, text: str, window: int, limit: int | None = None) -> Tensor:
    """The first `limit` windows of a text: consecutive and not overlapping; the rest is dropped.

    If the tokenizer begins every text with a BOS token, every window begins with it too.

    Returns:
        `[windows, window]` int64 token ids.

    Raises:
        TruedepthError: The text is shorter than one window, `window` is less than 2, `limit` less
            than 1, the text cannot be tokenized, or the model has no embedding for a token.
    """
    if window < 2:
        raise TruedepthError(f"A window needs at least 2 tokens to predict one, not {window}.")
    if limit is not None and limit < 1:
        raise TruedepthError(f"At least 1 window is needed, not {limit}.")
    prefix = beginning(source.tokenizer)
    body = window - len(prefix)
    (ids,) = token_ids(source, [text])
    count = len(ids) // body
    if count == 0:
        raise TruedepthError(
            f"The text has {len(ids)} tokens, fewer than one window of {window};"
            " give more text or use smaller windows."
        )
    count = min(count, limit or count)
    check_embedded(source, chain(prefix, islice(ids, count * body)))
    rows = [prefix + ids[start * body : (start + 1) * body] for start in range(count)]
    return torch.tensor(rows, dtype=torch.int64)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many positions a model was made for; None if its config does not say.

    Some files give `max_position_embeddings` without the factor by which rotary embeddings are
    stretched. It cannot be seen which, so the larger number counts. llama3 and longrope always give
    what is stretched already, and so do configs with several rotary embeddings.
    """
    positions: int | None = config.get("max_position_embeddings")
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if positions is None or not isinstance(scaling, Mapping):
        return positions
    kind = scaling.get("rope_type", scaling.get("type"))
    factor = scaling.get("factor")
    if kind not in STRETCHED or not isinstance(factor, int | float) or not 1 < factor < math.inf:
        return positions
    original = scaling.get("original_max_position_embeddings")
    if not isinstance(original, int) or original < 1:
        original = positions
    return max(positions, int(original * factor))


def window_of(source: Source, window: int | None, usual: int = WINDOW) -> int:
    """Tokens per window for a model.

    Args:
        source: The model.
        window: What the user asks for; None: the default.
        usual: The default for a model that has as many positions; others get all of theirs.

    Raises:
        TruedepthError: `window` exceeds the model's positions.
    """
    positions = positions_of(source.config)
    if window is None:
        return usual if positions is None else min(usual, positions)
    if positions is not None and window > positions:
        raise TruedepthError(
            f"A window of {window} tokens is longer than the {positions} positions of"
            f" {source.name}; use windows of at most {positions} tokens."
        )
    return window


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`[BOS]` if the tokenizer begins every text with that token, else `[]`."""
    with_special = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and with_special[:1] == [bos] else []
