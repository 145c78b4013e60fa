"""The text to train on: a mixture of texts, cut into windows of tokens that are kept in files.

The tokens that a run needs are streamed from their sources once and written to disk before the
first step. Training then picks windows by number, in an order that the seed decides, so a killed
run resumes without reading the text again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truedepth.errors import TruedepthError, reason_of
from truedepth.files.atomic import whole_file
from truedepth.healing.options import TextPart
from truedepth.progress import progress_bar
from truedepth.sources.source import Source
from truedepth.text import TEXT_SUFFIXES, beginning, check_embedded, documents, token_ids

VALIDATION_STRIDE = 8  # every 8th window of a text is for validation, until there are enough
SHUFFLED_DOCUMENTS = 10_000  # documents in the buffer that shuffles a stream
TOKENIZED = 100  # documents per call of the tokenizer
FILES = ("trained.int32", "validation.int32")


@dataclass(frozen=True)
class TrainingText:
    """Windows for training and for validation, disjoint; each `[windows, length]` int32."""

    trained: Tensor
    validation: Tensor
    tokens: dict[str, int]
    """Number of training tokens by the title of the part."""


@dataclass(frozen=True)
class Part:
    """One part of a mixture, to be read."""

    title: str
    weight: float
    """Its share of the tokens, relative to the weights of the other parts."""

    documents: Iterable[list[int]]
    """The tokens of its documents, which are read only as far as they are needed."""


def text_parts(parts: Sequence[TextPart], source: Source, seed: int) -> list[Part]:
    """The parts of a mixture of texts, with a random seed for the order of a hub dataset."""
    return [
        Part(part.title, part.weight, document_tokens(part_documents(part.name, seed), source))
        for part in parts
    ]


def mixed(texts: Sequence[Part], added: Sequence[Part], share: float) -> list[Part]:
    """The parts of a mixture of which `added` have a share of the tokens.

    Args:
        texts: Parts that have the rest, each by its weight among them.
        added: Parts that have the share likewise; all of it if there are no others.
        share: From 0 to 1.
    """
    found = []
    for parts, rest in ((texts, 1 - share if added else 1.0), (added, share if texts else 1.0)):
        whole = sum(part.weight for part in parts)
        found += [replace(part, weight=part.weight / whole * rest) for part in parts if rest]
    return found


def training_text(
    parts: Sequence[Part],
    source: Source,
    directory: Path,
    *,
    length: int,
    windows: int,
    validation: int,
) -> TrainingText:
    """Read a mixture, or reuse the windows that the same call has already written.

    Args:
        parts: What to mix.
        source: The model. Documents are joined by its tokenizer's end-of-text token; if that puts a
            BOS token before every text, every window starts with it.
        directory: Directory for the windows, which are memory-mapped from there.
        length: Tokens per window.
        windows: Number of training windows; there are fewer if the text ends first.
        validation: Number of windows to set aside for validation.

    Raises:
        TruedepthError: A part cannot be read, tokenized or embedded, or is empty, or the whole text
            is too short.
    """
    index = directory / "tokens.json"
    if not index.exists():
        directory.mkdir(parents=True, exist_ok=True)
        windows_of = [packed(part.documents, source, length) for part in parts]
        weights = [part.weight for part in parts]
        counts = _write(windows_of, weights, directory, windows, validation)
        if not counts["held"] or not sum(counts["trained"]):
            count = counts["held"] + sum(counts["trained"])
            raise TruedepthError(
                f"The text has {count * length} tokens in whole windows of {length}: too few to"
                f" train on, as one window in {VALIDATION_STRIDE} is set aside for validation."
                " Give more text or a smaller --sequence-length."
            )
        with whole_file(index) as partial:
            partial.write_text(json.dumps(counts), encoding="utf-8")
    counts = json.loads(index.read_text(encoding="utf-8"))
    trained, held = (
        torch.from_file(str(directory / name), size=count * length, dtype=torch.int32)
        for name, count in zip(FILES, (sum(counts["trained"]), counts["held"]), strict=True)
    )
    tokens: dict[str, int] = {}
    for part, count in zip(parts, counts["trained"], strict=True):
        tokens[part.title] = tokens.get(part.title, 0) + count * length
    return TrainingText(trained.view(-1, length), held.view(-1, length), tokens)


def _write(
    sources: Sequence[Iterator[list[int]]],
    weights: Sequence[float],
    directory: Path,
    windows: int,
    validation: int,
) -> dict[str, Any]:
    """Write windows, each from the source furthest behind its share, until there are enough."""
    seen, trained, held = [0] * len(sources), [0] * len(sources), 0
    left = set(range(len(sources)))
    with (
        (directory / FILES[0]).open("wb") as train,
        (directory / FILES[1]).open("wb") as validate,
        progress_bar("Reading text", windows + validation) as advance,
    ):
        while left and sum(trained) + held < windows + validation:
            part = min(left, key=lambda index: (seen[index] / weights[index], index))
            window = next(sources[part], None)
            if window is None:
                left.remove(part)
                continue
            seen[part] += 1
            full = sum(trained) == windows
            aside = held < validation and (seen[part] % VALIDATION_STRIDE == 0 or full)
            (validate if aside else train).write(np.array(window, dtype=np.int32).tobytes())
            held += aside
            trained[part] += not aside
            advance(1)
    return {"trained": trained, "held": held}


def document_tokens(texts: Iterable[str], source: Source) -> Iterator[list[int]]:
    """The token ids of each document.

    Raises:
        TruedepthError: A document cannot be tokenized.
    """
    texts = iter(texts)
    while some := list(islice(texts, TOKENIZED)):
        yield from token_ids(source, some, "A document")


def packed(documents: Iterable[list[int]], source: Source, length: int) -> Iterator[list[int]]:
    """Concatenated documents, cut into windows of token ids; an incomplete one is dropped.

    Raises:
        TruedepthError: The model lacks a token's embedding.
    """
    tokenizer = source.tokenizer
    prefix = beginning(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = length - len(prefix)
    left: list[int] = []
    documents = iter(documents)
    while some := list(islice(documents, TOKENIZED)):
        for ids in some:
            left += ids if ids[-1:] == end else ids + end
        check_embedded(source, prefix + left)
        whole = len(left) // body * body
        for start in range(0, whole, body):
            yield prefix + left[start : start + body]
        left = left[whole:]


def part_documents(name: str, seed: int = 0) -> Iterator[str]:
    """The documents of one part, streamed.

    Raises:
        TruedepthError: The part does not exist, holds no text, or cannot be read.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES)
        if not files:
            raise TruedepthError(f"{path} holds no .txt or .jsonl files.")
        for file in files:
            yield from documents(file)
    elif path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name):
        yield from documents(path)
    else:
        yield from _hub_documents(name, seed)


def _hub_documents(name: str, seed: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise TruedepthError(
            f"{name} is not a file here; datasets of the hub need `pip install truedepth[heal]`."
        ) from error
    repo, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, configuration or None, split="train", streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLED_DOCUMENTS)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise TruedepthError(
                    f"The dataset {name} has no column 'text' that holds text; it has"
                    f" {', '.join(map(repr, row))}."
                )
            yield row["text"]
    except TruedepthError:
        raise
    except Exception as error:  # datasets, pyarrow and HTTP libraries have errors of their own
        raise TruedepthError(
            f"{name} is neither a path here nor a dataset of the hub that can be read:"
            f" {reason_of(error)}"
        ) from error
