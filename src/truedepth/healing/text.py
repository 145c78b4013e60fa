"""What to train on: a mixture of texts, cut into windows of tokens and kept in a file.

As many tokens as a run needs are read once, streamed from where they are, and written down before
the first step. Training then draws windows by number: the order is a seed's, and a run that was
killed goes on where it was without reading again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from truedepth.errors import TruedepthError
from truedepth.files.atomic import whole_file
from truedepth.healing.options import TextPart
from truedepth.progress import progress_bar
from truedepth.text import TEXT_SUFFIXES, beginning, documents

HELD_OUT = 8  # of a text's windows one in so many is for validation, until there are enough
SHUFFLED_DOCUMENTS = 10_000  # of a stream, at a time
TOKENIZED = 100  # documents at a time
FILES = ("trained.int32", "validation.int32")


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on and to validate on, none in both; each `[windows, length]` int32."""

    trained: Tensor
    validation: Tensor
    tokens: dict[str, int]
    """Trained on, by the part's title."""


def training_text(
    parts: Sequence[TextPart],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    length: int,
    windows: int,
    validation: int,
    seed: int = 0,
) -> TrainingText:
    """Read a mixture, or find it in the directory where the same call wrote it before.

    Args:
        parts: What to mix.
        tokenizer: The model's. Documents are joined by its end-of-text token; where it begins every
            text with a BOS token, so does every window.
        directory: Gets the windows, mapped into memory from there.
        length: Tokens a window.
        windows: To train on; fewer where the text ends before.
        validation: Windows to set aside.
        seed: Of the order of a hub data set's documents.

    Raises:
        TruedepthError: A part cannot be read or is empty, or all together are too short.
    """
    index = directory / "tokens.json"
    if not index.exists():
        directory.mkdir(parents=True, exist_ok=True)
        sources = [packed(part_documents(part.name, seed), tokenizer, length) for part in parts]
        counts = _write(sources, [part.weight for part in parts], directory, windows, validation)
        if not counts["held"] or not sum(counts["trained"]):
            count = counts["held"] + sum(counts["trained"])
            raise TruedepthError(
                f"The text has {count * length} tokens in whole windows of {length}: too few to"
                f" train on, as one window in {HELD_OUT} is set aside for validation. Give more"
                " text or a smaller --sequence-length."
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
    """Take windows from whichever source is furthest behind its share, until there are enough."""
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
            aside = held < validation and (seen[part] % HELD_OUT == 0 or full)
            (validate if aside else train).write(np.array(window, dtype=np.int32).tobytes())
            held += aside
            trained[part] += not aside
            advance(1)
    return {"trained": trained, "held": held}


def packed(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[list[int]]:
    """Documents one behind another, cut into windows; the rest at the end is dropped."""
    prefix = beginning(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = length - len(prefix)
    left: list[int] = []
    texts = iter(texts)
    while some := list(islice(texts, TOKENIZED)):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            left += ids + end
        whole = len(left) // body * body
        for start in range(0, whole, body):
            yield prefix + left[start : start + body]
        left = left[whole:]


def part_documents(name: str, seed: int = 0) -> Iterator[str]:
    """The documents of one part, streamed.

    Raises:
        TruedepthError: It is not there, holds no text, or cannot be read.
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
            f"{name} is not a file here; data sets of the hub need `pip install truedepth[heal]`."
        ) from error
    repo, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, configuration or None, split="train", streaming=True)
        rows = rows.shuffle(seed=seed, buffer_size=SHUFFLED_DOCUMENTS)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise TruedepthError(
                    f"The data set {name} has no column 'text' that holds text; it has"
                    f" {', '.join(map(repr, row))}."
                )
            yield row["text"]
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0].rstrip(".")
        raise TruedepthError(
            f"{name} is neither a path here nor a data set of the hub that can be read:"
            f" {type(error).__name__}: {reason}."
        ) from error
