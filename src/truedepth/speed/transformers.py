"""Speed of models that transformers runs, in one process or over ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.distributed import DistributedConfig

from truedepth.runtime.loading import load
from truedepth.speed.collectives import watched
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import DECODED, Case, Collectives, Row, Setup, Task, interleaved


class TransformersRunner:
    """A loaded model; under tensor parallelism all ranks call it with the same cases."""

    def __init__(self, model: Any, compiled: bool | None = None) -> None:
        """Of a model where it computes.

        Args:
            model: transformers' own.
            compiled: Single tokens through `torch.compile`, with CUDA graphs on a GPU, and a static
                cache; by default on a GPU.
        """
        self._model = model
        self._compiled = model.device.type == "cuda" if compiled is None else compiled
        self._step = model
        if self._compiled:
            self._step = torch.compile(model, mode="reduce-overhead", dynamic=False)
        self._static: tuple[Case, StaticCache] | None = None

    @torch.inference_mode()
    def seconds(self, case: Case) -> float:
        """One run; of decoding, a token's."""
        taken = stopwatch(self._prepare(case, self._step), self._model.device)
        return taken / DECODED if case.task is Task.decode else taken

    @torch.inference_mode()
    def collectives(self, case: Case) -> Collectives | None:
        """One more run, watched and not compiled; of decoding, a token's."""
        if not dist.is_initialized():
            return None
        steps = self._prepare(case, self._model)
        with watched() as traffic:
            taken = stopwatch(steps, self._model.device)
        runs = DECODED if case.task is Task.decode else 1
        return Collectives(
            {kind: calls // runs for kind, calls in traffic.calls.items()},
            traffic.bytes // runs,
            traffic.seconds / runs,
            traffic.seconds / taken,
        )

    def _prepare(self, case: Case, step: Any) -> Callable[[], None]:
        """What is timed."""
        ids = self._tokens(case.batch, case.length)
        if case.task is Task.prefill:
            steps = partial(self._model, ids, use_cache=True, logits_to_keep=1)
        else:
            count = DECODED if case.task is Task.decode else case.length
            steps = partial(self._generate, step, ids[:, :1], self._cache_of(case, ids), count)
        if dist.is_initialized():
            dist.barrier()
        return steps

    def _generate(self, step: Any, token: Tensor, cache: Cache, count: int) -> None:
        for _ in range(count):
            output = step(token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)

    def _cache_of(self, case: Case, ids: Tensor) -> Cache:
        """Empty to generate, full to decode."""
        cache = self._static_cache(case, ids) if self._compiled else DynamicCache()
        if case.task is Task.decode:
            self._fill(cache, ids)
        return cache

    def _static_cache(self, case: Case, ids: Tensor) -> StaticCache:
        """Empty; for CUDA graphs in the memory of the case's last run."""
        if self._static is None or self._static[0] != case:
            self._static = case, StaticCache(self._model.config, case.length + DECODED)
            self._fill(self._static[1], ids)  # takes its memory outside the compiled step
        cache = self._static[1]
        cache.reset()
        return cache

    def _fill(self, cache: Cache, ids: Tensor) -> None:
        self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _tokens(self, batch: int, length: int) -> Tensor:
        ids = torch.arange(batch * length, device=self._model.device).view(batch, length)
        return ids.remainder(self._model.config.vocab_size)


def stopwatch(function: Callable[[], object], device: torch.device | str) -> float:
    """Seconds that a function takes, on a GPU between events."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def measure(setup: Setup, cases: list[Case], repetitions: int) -> list[Row]:
    """Time a model and its base, in this process or over ranks.

    Args:
        setup: The models, and how they run.
        cases: What to time.
        repetitions: Of each.

    Raises:
        TruedepthError: A model cannot be loaded.
    """
    if setup.ranks == 1:
        return _measured(setup, cases, repetitions)
    rows: list[Row] = run_ranks(setup.ranks, _measured, setup, cases, repetitions)
    return rows


def _measured(setup: Setup, cases: list[Case], repetitions: int) -> list[Row]:
    """In this process."""
    options: dict[str, Any] = {"device": setup.device, "dtype": setup.dtype}
    if setup.ranks > 1:
        options["distributed_config"] = DistributedConfig(tp_size=setup.ranks)
        options["device_map"] = None

    def runner(name: str) -> TransformersRunner:
        return TransformersRunner(load(name, **options).model, False if setup.eager else None)

    # Every case is compiled for itself; at a limit Dynamo would go on uncompiled without a word.
    limit = {"recompile_limit": 4 * len(cases) + 8, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limit):
        against = runner(setup.against) if setup.against else None
        return interleaved(runner(setup.model), against, cases, repetitions)
