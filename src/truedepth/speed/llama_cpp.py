"""Times GGUF files in llama.cpp."""

from __future__ import annotations

import time
from pathlib import Path

from truedepth.errors import TruedepthError
from truedepth.runtime.llama_cpp import BATCH, Context
from truedepth.speed.timing import DECODED, Case, Collectives, Row, Setup, Task, interleaved


class TimedLlamaCppModel:
    """A GGUF file in llama.cpp, timed with llama.cpp's default KV cache."""

    def __init__(self, context: Context) -> None:
        """Time a loaded file; make the context with `exact=False`."""
        self._context = context

    def seconds(self, case: Case) -> float:
        """Seconds of one run; for `decode`, per token."""
        context = self._context
        context.room(case.length + DECODED)
        prompt = [index % context.vocabulary for index in range(case.length)]
        context.forget()
        if case.task is Task.prefill:
            start = time.perf_counter()
            self._read(prompt)
            return time.perf_counter() - start
        count = case.length
        if case.task is Task.decode:
            self._read(prompt)
            prompt, count = prompt[-1:], DECODED
        token = prompt[0]
        start = time.perf_counter()
        for _ in range(count):
            context.decode([token])
            token = int(context.logits(1).argmax())
        return (time.perf_counter() - start) / (DECODED if case.task is Task.decode else 1)

    def collectives(self, case: Case) -> Collectives | None:
        """None: llama.cpp runs in one process."""
        return None

    def _read(self, prompt: list[int]) -> None:
        for start in range(0, len(prompt), BATCH):
            piece = prompt[start : start + BATCH]
            last = start + BATCH >= len(prompt)
            self._context.decode(piece, len(piece) - 1 if last else len(piece))
        self._context.logits(1)  # waits until the logits are computed


def measure(setup: Setup, cases: list[Case], repetitions: int) -> list[Row]:
    """Time a file and its base, both loaded at once.

    Args:
        setup: The files, and the device.
        cases: Cases to time; all of batch size 1.
        repetitions: Timed runs of each file and case.

    Raises:
        TruedepthError: A batch is larger than 1, or llama.cpp is not installed or fails.
    """
    if any(case.batch > 1 for case in cases):
        raise TruedepthError("llama.cpp is timed with one sequence at a time; give --batch 1.")

    def timed(name: str) -> TimedLlamaCppModel:
        return TimedLlamaCppModel(Context(Path(name), device=setup.device, exact=False))

    against = timed(setup.against) if setup.against else None
    return interleaved(timed(setup.model), against, cases, repetitions)
