"""Times models in transformers, in one process or tensor-parallel over several."""

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

from truedepth.runtime.fusing import fuse
from truedepth.runtime.kv_cache import cache_argument
from truedepth.runtime.loading import load
from truedepth.speed.collectives import watched
from truedepth.speed.ranks import run_ranks
from truedepth.speed.timing import DECODED, Case, Collectives, Row, Setup, Task, interleaved


class TimedTransformersModel:
    """A loaded model; under tensor parallelism, all ranks time the same cases in the same order."""

    def __init__(self, model: Any, compiled: bool | None = None) -> None:
        """Time a model on the device that it is on.

        Args:
            model: A model of transformers.
            compiled: Run single tokens through `torch.compile`, with a static cache and, on a GPU,
                CUDA graphs. Default: on a GPU only.
        """
        self._model = model
        self._compiled = model.device.type == "cuda" if compiled is None else compiled
        self._step = model
        if self._compiled:
            self._step = torch.compile(model, mode="reduce-overhead", dynamic=False)
        self._static: tuple[Case, StaticCache] | None = None

    @torch.inference_mode()
    def seconds(self, case: Case) -> float:
        """Seconds of one run; for `decode`, per token."""
        taken = stopwatch(self._prepare(case, self._step), self._model.device)
        return taken / DECODED if case.task is Task.decode else taken

    @torch.inference_mode()
    def collectives(self, case: Case) -> Collectives | None:
        """The collectives of one more run, not compiled; for `decode`, per token."""
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
        """Make the function to time, with its caches ready."""
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
        given = cache_argument(self._model, cache)
        for _ in range(count):
            output = step(token, **given, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)

    def _cache_of(self, case: Case, ids: Tensor) -> Cache:
        """A KV cache: for `generate` empty, for `decode` with the prompt in it."""
        cache = self._static_cache(case, ids) if self._compiled else DynamicCache()
        if case.task is Task.decode:
            self._fill(cache, ids)
        return cache

    def _static_cache(self, case: Case, ids: Tensor) -> StaticCache:
        """An empty cache; CUDA graphs need it in the same memory in every run of a case."""
        if self._static is None or self._static[0] != case:
            self._static = case, StaticCache(self._model.config, case.length + DECODED)
            self._fill(self._static[1], ids)  # allocates its memory outside the compiled step
        cache = self._static[1]
        cache.reset()
        return cache

    def _fill(self, cache: Cache, ids: Tensor) -> None:
        given = cache_argument(self._model, cache)
        self._model(ids, **given, use_cache=True, logits_to_keep=1)

    def _tokens(self, batch: int, length: int) -> Tensor:
        ids = torch.arange(batch * length, device=self._model.device).view(batch, length)
        return ids.remainder(self._model.config.vocab_size)


def stopwatch(function: Callable[[], object], device: torch.device | str) -> float:
    """Seconds that a function takes; on a GPU measured between two CUDA events."""
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
    """Time a model and its base, in this process or over several ranks.

    Args:
        setup: The models, and how they run.
        cases: Cases to time.
        repetitions: Timed runs of each model and case.

    Raises:
        TruedepthError: A model cannot be loaded, or a rank fails.
    """
    if setup.ranks == 1:
        return _measured(setup, cases, repetitions)
    rows: list[Row] = run_ranks(setup.ranks, _measured, setup, cases, repetitions)
    return rows


def _measured(setup: Setup, cases: list[Case], repetitions: int) -> list[Row]:
    """Time both models in this process, which may be one of several ranks."""
    options: dict[str, Any] = {"device": setup.device, "dtype": setup.dtype}
    if setup.ranks > 1:
        options["distributed_config"] = DistributedConfig(tp_size=setup.ranks)
        options["device_map"] = None

    def timed(name: str) -> TimedTransformersModel:
        model = load(name, **options).model
        model = fuse(model) if setup.fuse else model
        return TimedTransformersModel(model, False if setup.eager else None)

    # Every case is compiled separately; at the default limit Dynamo would silently stop compiling.
    limit = {"recompile_limit": 4 * len(cases) + 8, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limit):
        against = timed(setup.against) if setup.against else None
        return interleaved(timed(setup.model), against, cases, repetitions)
