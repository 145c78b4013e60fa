"""Text to measure on, and how it is cut into windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truedepth.errors import TruedepthError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from truedepth.sources.source import Source

TEXT_SUFFIXES = (".txt", ".jsonl")

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
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = enumerate(file, 1) if path.suffix == ".jsonl" else [(0, file.read())]
            for number, line in lines:
                if line.strip():
                    document = _document(line, path, number) if number else line
                    empty = empty and not document.strip()
                    yield document
    except OSError as error:
        raise TruedepthError(f"Cannot read the text {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise TruedepthError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    if empty:
        raise TruedepthError(f"{path} is empty; give a file with text.")


def _document(line: str, path: Path, number: int) -> str:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise TruedepthError(f"Line {number} of {path} is not valid JSON.") from error
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise TruedepthError(f"Line {number} of {path} must be an object with a string 'text'.")
    return str(document["text"])


def token_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, window: int, limit: int | None = None
) -> Tensor:
    """The first `limit` windows of a text: consecutive and not overlapping; the rest is dropped.

    If the tokenizer begins every text with a BOS token, every window begins with it too.

    Returns:
        `[windows, window]` int64 token ids.

    Raises:
        TruedepthError: The text is shorter than one window, `window` is less than 2, or `limit`
            less than 1.
    """
    if window < 2:
        raise TruedepthError(f"A window needs at least 2 tokens to predict one, not {window}.")
    if limit is not None and limit < 1:
        raise TruedepthError(f"At least 1 window is needed, not {limit}.")
    prefix = beginning(tokenizer)
    body = window - len(prefix)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(ids) // body
    if count == 0:
        raise TruedepthError(
            f"The text has {len(ids)} tokens, fewer than one window of {window};"
            " give more text or use smaller windows."
        )
    count = min(count, limit or count)
    rows = [prefix + ids[start * body : (start + 1) * body] for start in range(count)]
    return torch.tensor(rows, dtype=torch.int64)


def check_window(source: Source, window: int) -> None:
    """Refuse windows of more tokens than a model has positions.

    Raises:
        TruedepthError: `window` exceeds the config's `max_position_embeddings`.
    """
    positions = source.config.get("max_position_embeddings")
    if positions is not None and window > positions:
        raise TruedepthError(
            f"A window of {window} tokens is longer than the {positions} positions of"
            f" {source.name}; use windows of at most {positions} tokens."
        )


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`[BOS]` if the tokenizer begins every text with that token, else `[]`."""
    with_special = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and with_special[:1] == [bos] else []
