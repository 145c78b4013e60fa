"""Speed of models that transformers runs, in one process or over ranks."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache
from transformers.distributed import DistributedConfig

from truedepth.bench import Case, Collectives, Row, Task, interleaved
from truedepth.collectives import watched
from truedepth.errors import TruedepthError
from truedepth.loading import load
from truedepth.padding import KEY_VALUE, QUERY, head_padding
from truedepth.ranks import run_ranks
from truedepth.sources import Source, open_source

DECODED = 8  # tokens of a decoding run; a single one is too short to time


class TransformersRunner:
    """A loaded model; under tensor parallelism all ranks call it with the same cases."""

    def __init__(self, model: Any) -> None:
        """Of a model where it computes."""
        self._model = model
        self._cache: tuple[Case, DynamicCache] | None = None

    @torch.inference_mode()
    def seconds(self, case: Case) -> float:
        """One run; of decoding, a token's."""
        steps = self._prepare(case)
        start = time.perf_counter()
        steps()
        self._synchronize()
        taken = time.perf_counter() - start
        return taken / DECODED if case.task is Task.decode else taken

    @torch.inference_mode()
    def collectives(self, case: Case) -> Collectives | None:
        """One more run, watched; of decoding, a token's."""
        if not dist.is_initialized():
            return None
        steps = self._prepare(case)
        start = time.perf_counter()
        with watched() as traffic:
            steps()
        self._synchronize()
        runs = DECODED if case.task is Task.decode else 1
        return Collectives(
            {kind: calls // runs for kind, calls in traffic.calls.items()},
            traffic.bytes // runs,
            traffic.seconds / (time.perf_counter() - start),
        )

    def _prepare(self, case: Case) -> Any:
        """What is timed, as a call."""
        ids = self._tokens(case.batch, case.length)
        cache: DynamicCache | None = None
        if case.task is Task.decode:
            cache = self._filled(case, ids)
        self._synchronize()
        if dist.is_initialized():
            dist.barrier()
        if case.task is Task.prefill:
            return lambda: self._model(ids, use_cache=True, logits_to_keep=1)
        count = DECODED if case.task is Task.decode else case.length
        return lambda: self._generate(ids[:, :1], cache or DynamicCache(), count)

    def _generate(self, token: Tensor, cache: DynamicCache, count: int) -> None:
        for _ in range(count):
            output = self._model(token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)

    def _filled(self, case: Case, ids: Tensor) -> DynamicCache:
        """A cache of so many tokens: kept from the last run, without what that added."""
        if self._cache is None or self._cache[0] != case:
            cache = DynamicCache()
            self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._cache = case, cache
        cache = self._cache[1]
        if added := cache.get_seq_length() - case.length:
            cache.crop(-added)
        return cache

    def _tokens(self, batch: int, length: int) -> Tensor:
        ids = torch.arange(batch * length, device=self._model.device).view(batch, length)
        return ids.remainder(self._model.config.vocab_size)

    def _synchronize(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def measure(
    model: str,
    base: str | None,
    cases: list[Case],
    repetitions: int,
    ranks: int,
    device: str | None,
    dtype: torch.dtype | None,
) -> list[Row]:
    """Time a model and its base, in this process or over ranks.

    Args:
        model: What `load` takes.
        base: The same.
        cases: What to time.
        repetitions: Of each.
        ranks: Of tensor parallelism.
        device: As in `load`.
        dtype: As in `load`.

    Raises:
        TruedepthError: A model cannot be loaded so.
    """
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    if ranks == 1:
        return _measured(model, base, cases, repetitions, options)
    for each in filter(None, (model, base)):
        check_shards(open_source(each), ranks)
    options |= {"distributed_config": DistributedConfig(tp_size=ranks), "device_map": None}
    rows: list[Row] = run_ranks(ranks, _measured, model, base, cases, repetitions, options)
    return rows


def _measured(
    model: str, base: str | None, cases: list[Case], repetitions: int, options: dict[str, Any]
) -> list[Row]:
    """In this process; `options` are those of `load`."""
    against = TransformersRunner(load(base, **options).model) if base else None
    return interleaved(
        TransformersRunner(load(model, **options).model), against, cases, repetitions
    )


def check_shards(source: Source, ranks: int) -> None:
    """Over ranks a model's heads and FFN width must divide, and it must be a directory.

    Raises:
        TruedepthError: They do not, or it is not.
    """
    if head_padding(source.config, ranks):
        heads, kv_heads = (source.config.get(name) for name in (QUERY, KEY_VALUE))
        raise TruedepthError(
            f"{source.path} has {heads} heads and {kv_heads or heads} KV heads, which do not divide"
            f" by {ranks} ranks; convert it with --pad-heads {ranks} (--pairs 0 for the original as"
            " it is)."
        )
    if not source.path.is_dir():
        raise TruedepthError(
            f"transformers shards no GGUF files; convert {source.name} (--pairs 0 as it is)."
        )
