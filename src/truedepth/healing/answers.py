"""What the original itself answers to prompts, as text to train on.

The original answers in batches, greedily or by sampling, and every batch is kept in a file at once,
so a killed run goes on behind the last one, and other runs can use the answers too. Each line of
the file holds a prompt and its answer, to be read, and the tokens of both, to be trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any

import torch

from truedepth.errors import TruedepthError
from truedepth.files.kept_lines import KeptLines
from truedepth.healing.options import FROM_TEXT, Healing
from truedepth.healing.text import Part, part_documents
from truedepth.progress import note
from truedepth.runtime.generation import continuations
from truedepth.runtime.loading import Loaded, load
from truedepth.runtime.prompt import Prompt, prompt_ids, read_prompts
from truedepth.sources.source import Source

ANSWERS = "answers-{}.jsonl"
"""The file of a part's answers, by the part's number."""

BATCHES = {"cpu": 32, "cuda": 256}  # prompts that are answered at once
LONGEST_SENTENCE = 300  # characters
SENTENCE = re.compile(r"\S+\s.*?[.!?](?=\s|$)", re.DOTALL)  # no end after one word: "1.", "Mr."


@dataclass(frozen=True)
class Answering:
    """The original, which answers prompts."""

    original: Source
    options: Healing
    length: int
    """Largest number of tokens in a prompt and its answer together; longer answers are cut."""

    device: torch.device
    dtype: torch.dtype

    def parts(self, directory: Path) -> list[Part]:
        """The parts of the training text that the original writes.

        Args:
            directory: Directory for the answers, unless the options name one.
        """
        directory = (self.options.keep_answers or directory).expanduser()
        found = []
        for number, part in enumerate(self.options.own_answers, 1):
            prompts, file = partial(self._prompts, part.name), directory / ANSWERS.format(number)
            documents = self.documents(prompts, file, number)
            found.append(Part(f"answers to {part.title}", part.weight, documents))
        return found

    def _prompts(self, name: str) -> Iterable[Prompt]:
        if name != FROM_TEXT:
            return read_prompts(name)
        texts = (part_documents(part.name, self.options.seed) for part in self.options.texts)
        turns = zip_longest(*map(first_sentences, texts))
        return (prompt for turn in turns for prompt in turn if prompt is not None)

    @cached_property
    def _loaded(self) -> Loaded:
        return load(self.original, device=self.device, dtype=self.dtype)

    @property
    def _batch_size(self) -> int:
        return BATCHES.get(self.device.type, BATCHES["cuda"])

    def documents(
        self, prompts: Callable[[], Iterable[Prompt]], file: Path, part: int
    ) -> Iterator[list[int]]:
        """The tokens of prompts and their answers: what the file has, then as many as are read.

        Args:
            prompts: Reads the prompts. They are answered once by the most likely tokens, and again
                and again by sampling.
            file: Keeps the answers; made if it is not there.
            part: The number of the part, for samples of its own.

        Raises:
            TruedepthError: The file holds other answers or another run is using it, no prompt
                leaves room for an answer, or one cannot be used (see `prompt_ids`).
        """
        settings = {**self._settings(), "part": part}
        with KeptLines(file, "answers", "answers_of", settings) as kept:
            for number, batch in enumerate(self._batches(prompts)):
                start = number * self._batch_size
                lines = kept.lines[start : start + len(batch)]
                asked = [prompt for prompt, _ in batch[: len(lines)]]
                if [line.get(_key(each)) for line, each in zip(lines, asked, strict=True)] != asked:
                    raise TruedepthError(
                        f"{file.parent} holds answers to other prompts; give another directory."
                    )
                if not all(isinstance(line.get("ids"), list) for line in lines):
                    raise kept.damaged
                if len(lines) < len(batch):
                    added = self._answered(f"{part} {number}", batch)[len(lines) :]
                    kept.write(added)
                    lines = [*lines, *added]
                yield from (line["ids"] for line in lines)

    def _batches(
        self, prompts: Callable[[], Iterable[Prompt]]
    ) -> Iterator[list[tuple[Prompt, list[int]]]]:
        """Prompts with their tokens, in batches; those that fill a window are left out."""
        found = self._with_tokens(prompts)
        while batch := list(islice(found, self._batch_size)):
            yield batch

    def _with_tokens(
        self, prompts: Callable[[], Iterable[Prompt]]
    ) -> Iterator[tuple[Prompt, list[int]]]:
        for again in count():
            fitting, too_long = 0, 0
            try:
                for prompt in prompts():
                    ids = prompt_ids(self.original, prompt, room=False)
                    if len(ids) >= self.length:
                        too_long += 1
                        continue
                    fitting += 1
                    yield prompt, ids
            finally:  # also where no more prompts are needed
                if too_long and not again:
                    note(
                        f"{too_long} prompts fill a window of {self.length} tokens and are left"
                        " out."
                    )
            if not fitting:
                raise TruedepthError(
                    f"No prompt leaves room for an answer in a window of {self.length} tokens; give"
                    " shorter prompts or a larger --sequence-length."
                )
            if self.options.answer_temperature == 0:
                return

    def _answered(self, number: str, batch: list[tuple[Prompt, list[int]]]) -> list[dict[str, Any]]:
        """The lines of a batch, each answer within the model's positions behind its own prompt."""
        ids = [ids for _, ids in batch]
        with torch.random.fork_rng():
            torch.manual_seed(random.Random(f"{self.options.seed} {number}").getrandbits(63))
            written = continuations(
                self._loaded,
                ids,
                self.options.answer_tokens,
                self._batch_size,
                temperature=self.options.answer_temperature,
            )
        tokenizer = self.original.tokenizer
        return [
            {
                _key(prompt): prompt,
                "answer": tokenizer.decode(answer, skip_special_tokens=True),
                "ids": (own + answer)[: self.length],
            }
            for (prompt, own), answer in zip(batch, written, strict=True)
        ]

    def _settings(self) -> Mapping[str, Any]:
        return {
            "original": self.original.fingerprint,
            "temperature": self.options.answer_temperature,
            "longest": self.options.answer_tokens,
            "length": self.length,
            "seed": self.options.seed,
        }


def _key(prompt: Prompt) -> str:
    return "prompt" if isinstance(prompt, str) else "messages"


def first_sentences(documents: Iterable[str]) -> Iterator[str]:
    """The first sentence of each paragraph that has one; else the beginning of the document."""
    for text in documents:
        starts = [each.strip()[:LONGEST_SENTENCE] for each in re.split(r"\n\s*\n", text.strip())]
        found = [sentence[0] for start in starts if (sentence := SENTENCE.match(start))]
        if found:
            yield from found
        elif start := starts[0]:
            yield start if start == text.strip() else start.rpartition(" ")[0] or start
