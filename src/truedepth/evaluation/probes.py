"""Small tasks that a seed makes: what breaks before the loss on text shows it.

Every item is a prompt and the one right answer, computed with it. The model continues the prompt
greedily; the first line of what it writes, or its first sentence, is right or wrong.

    sums, products         two numbers
    brackets               those that are open, closed in order
    copying, reversing     a list of words
    look-up                the number of one of four names
    needle                 one of three sentences in a long text
    two hops               two of six sentences in a long text, the second found by the first

The short tasks show four examples first. The length of a long text is given in tokens; lengths
beyond a model's positions are left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml

from truedepth.errors import TruedepthError
from truedepth.evaluation.scores import TaskScore, task_score
from truedepth.options import Bounds, checked
from truedepth.progress import note
from truedepth.runtime.generation import continuations
from truedepth.runtime.loading import Loaded, load, opened, source_of
from truedepth.runtime.prompt import prompt_ids
from truedepth.sources.source import Source
from truedepth.tensors import dtype_name
from truedepth.text import positions_of

EXAMPLES = 4
LENGTHS = (1024, 2048, 4096, 8192)
ROOM = 16  # tokens more than a right answer has, for what a wrong one may say
BATCH_TOKENS = 8192  # of prompts that are continued at once

WORDS, PLACES, DOINGS, DAYS = (
    tuple(words)
    for words in yaml.safe_load(
        files("truedepth.evaluation").joinpath("words.yaml").read_text(encoding="utf-8")
    ).values()
)
PAIRS = ("()", "[]", "{}")


@dataclass(frozen=True)
class Item:
    """One question."""

    prompt: str
    answer: str

    def is_right(self, written: str) -> bool:
        """Whether the answer is the first line of what was written, or its first sentence."""
        lines = written.strip().splitlines() or [""]
        return lines[0].split(". ")[0].rstrip(". ") == self.answer


@dataclass(frozen=True)
class Probes:
    """How often a model, and its original, answered right."""

    model: str
    """The model's name and where it was found."""

    against: str | None
    """The original's name and where it was found."""

    scores: list[TaskScore]
    seed: int
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """All scores and settings as JSON-compatible data."""
        return asdict(self) | {"scores": [score.to_dict() for score in self.scores]}


def _sum(rng: random.Random) -> tuple[str, str]:
    one, other = rng.randint(2, 99), rng.randint(2, 20)
    return f"{one} + {other} =", str(one + other)


def _product(rng: random.Random) -> tuple[str, str]:
    one, other = rng.randint(2, 9), rng.randint(2, 12)
    return f"{one} * {other} =", str(one * other)


def _brackets(rng: random.Random) -> tuple[str, str]:
    pairs = rng.choices(PAIRS, k=rng.randint(2, 4))
    opened, closed = ([pair[end] for pair in pairs] for end in (0, 1))
    return " ".join(opened), " ".join(reversed(closed))


def _copy(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.sample(WORDS, rng.randint(4, 8)))
    return f"Copy: {words}\nCopied:", words


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(2, 3))
    return f"Reverse: {' '.join(words)}\nReversed:", " ".join(reversed(words))


def _look_up(rng: random.Random) -> tuple[str, str]:
    numbers = {name: rng.randint(1000, 9999) for name in rng.sample(WORDS, 4)}
    listed = ", ".join(f"{name} {number}" for name, number in numbers.items())
    name = rng.choice(list(numbers))
    return f"List: {listed}\nNumber of {name}:", str(numbers[name])


SHORT: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sums": _sum,
    "products": _product,
    "brackets": _brackets,
    "copying": _copy,
    "reversing": _reverse,
    "look-up": _look_up,
}
"""By name: a question and its answer."""


def _needle(rng: random.Random) -> tuple[list[str], str, str]:
    numbers = {name: str(rng.randint(1000, 9999)) for name in rng.sample(WORDS, 3)}
    told = [f"The number of the {name} house is {number}." for name, number in numbers.items()]
    name = rng.choice(list(numbers))
    return told, f"The number of the {name} house is", numbers[name]


def _two_hops(rng: random.Random) -> tuple[list[str], str, str]:
    names = rng.sample(WORDS, 6)
    numbers = {box: str(rng.randint(1000, 9999)) for box in names[3:]}
    told = [f"The {key} key opens the {box} box." for key, box in zip(names, numbers, strict=False)]
    told += [f"The {box} box holds the number {number}." for box, number in numbers.items()]
    key, box = rng.choice(list(zip(names, numbers, strict=False)))
    return told, f"The box that the {key} key opens holds the number", numbers[box]


LONG: dict[str, Callable[[random.Random], tuple[list[str], str, str]]] = {
    "needle": _needle,
    "two hops": _two_hops,
}
"""By name: sentences to hide in a long text, a sentence to end, and its end."""


def short_items(name: str, number: int, seed: int) -> list[Item]:
    """Items of a task, each with examples of its own before it.

    Args:
        name: One of `SHORT`.
        number: How many.
        seed: Of the numbers and words; items of one seed do not depend on their number.
    """
    items = []
    for index in range(number):
        rng = random.Random(f"{seed} {name} {index}")
        shown = [SHORT[name](rng) for _ in range(EXAMPLES)]
        question, answer = SHORT[name](rng)
        before = "".join(f"{asked} {given}\n\n" for asked, given in shown)
        items.append(Item(before + question, answer))
    return items


def long_items(name: str, number: int, seed: int, length: int, source: Source) -> list[Item]:
    """Items of a task in long texts, which are filled up to a number of tokens.

    Args:
        name: One of `LONG`.
        number: How many.
        seed: Of the numbers, words and sentences.
        length: Largest number of tokens of a prompt; fewer by one sentence at most.
        source: Whose tokenizer counts them.
    """
    return [
        _long_item(name, random.Random(f"{seed} {name} {length} {index}"), length, source)
        for index in range(number)
    ]


def _long_item(name: str, rng: random.Random, length: int, source: Source) -> Item:
    told, question, answer = LONG[name](rng)
    filler = _filler(rng)
    sentences = [next(filler)]

    def prompt() -> str:
        every = sentences.copy()
        for place, sentence in sorted(zip(places, told, strict=True), reverse=True):
            every.insert(int(place * len(sentences)), sentence)
        return f"{' '.join(every)}\n{question}"

    def size() -> int:
        return len(source.tokenizer(prompt())["input_ids"])

    places = [rng.random() for _ in told]
    each = len(source.tokenizer(sentences[0])["input_ids"])
    if size() > length:
        raise TruedepthError(
            f"{name}: there is no room in {length + ROOM} tokens for what is asked; give larger"
            " --lengths (lengths in Python)."
        )
    while (spare := length - size()) > 0:
        sentences += [next(filler) for _ in range(max(1, spare // (2 * each)))]
    sentences.pop()
    return Item(prompt(), answer)


def _filler(rng: random.Random) -> Iterator[str]:
    """Sentences that say nothing of what is asked."""
    for day in count():
        thing, place = rng.choice(WORDS), rng.choice(PLACES)
        yield f"On {DAYS[day % 7]} the {place} {rng.choice(DOINGS)}, and nobody saw the {thing}."


@checked
def probe(
    model: str | Path | Source | Loaded,
    *,
    against: str | Path | Source | Loaded | None = None,
    items: Annotated[int, Bounds(1)] = 50,
    lengths: Sequence[int] = LENGTHS,
    batch_size: Annotated[int | None, Bounds(1)] = None,
    seed: int = 1234,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Probes:
    """Let a model, and its original, answer small tasks that are made by a seed.

    Args:
        model: The model: anything that `load` takes, or a `Loaded`.
        against: The original, which answers the same items; default: the model alone.
        items: Number of items per task, and per task and length.
        lengths: Tokens of long texts.
        batch_size: Prompts that are continued at once. Default: as many as have 8,192 tokens.
        seed: Of the items.
        device: Device of the models, unless they are loaded already.
        dtype: Dtype of the models, unless they are loaded already.

    Raises:
        TruedepthError: A model cannot be loaded, or runs in llama.cpp, or a text is too long for
            its positions or too short for what is asked.
    """
    models = [opened(each) for each in (model, against) if each is not None]
    sources = [source_of(each) for each in models]
    tasks = {name: short_items(name, items, seed) for name in SHORT}
    for length in sorted(_within(sources, lengths)):
        for name in LONG:
            tasks[f"{name}, {length:,} tokens"] = long_items(
                name, items, seed, length - ROOM, sources[0]
            )
    answered, dtypes = [], []
    for each in models:
        loaded = load(each, device=device, dtype=dtype)
        if loaded.model._is_stateful:
            raise TruedepthError(
                f"{loaded.source.name} runs in llama.cpp, which cannot answer probes here; give the"
                " checkpoint that it was exported from."
            )
        dtypes.append(dtype_name(loaded.model.dtype))
        answered.append({name: _right(loaded, own, batch_size) for name, own in tasks.items()})
        del loaded  # frees its memory before the next one is loaded
    scores = []
    for name in tasks:
        ours, *theirs = (
            {(name, number): float(right) for number, right in enumerate(each[name])}
            for each in answered
        )
        scores.append(task_score(name, "right", ours, theirs[0] if theirs else None))
    names = [each.label for each in sources]
    return Probes(names[0], names[1] if against is not None else None, scores, seed, dtypes[0])


def _within(sources: Sequence[Source], lengths: Sequence[int]) -> list[int]:
    """Those of the lengths that fit in all models' positions."""
    positions = min((positions_of(s.config) or max(lengths, default=0) for s in sources), default=0)
    left_out = [length for length in lengths if length > positions]
    if left_out:
        note(
            f"texts of {', '.join(map(str, left_out))} tokens are left out: there are {positions}"
            " positions."
        )
    return [length for length in lengths if length <= positions]


def _right(loaded: Loaded, items: Sequence[Item], batch_size: int | None) -> list[bool]:
    """Which of the items a model answers right."""
    prompts = [prompt_ids(loaded.source, item.prompt, raw=True) for item in items]
    longest = max(len(loaded.tokenizer(item.answer)["input_ids"]) for item in items)
    batch = batch_size or max(1, BATCH_TOKENS // max(map(len, prompts)))
    written = continuations(loaded, prompts, longest + ROOM, batch)
    texts = (loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in written)
    return [item.is_right(text) for item, text in zip(items, texts, strict=True)]
