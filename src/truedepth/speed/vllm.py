"""Times models in vLLM."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from math import ceil, prod
from typing import Any

import torch
from torch.profiler import profile
from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from truedepth.errors import TruedepthError
from truedepth.files.descriptors import redirected
from truedepth.inspection import inspect_model
from truedepth.sources.opening import open_source
from truedepth.speed.timing import DECODED, Case, Collectives, Row, Setup, Task, interleaved
from truedepth.tensors import dtype_name

KINDS = re.compile(r"all_?reduce|all_?gather|reduce_?scatter|cross_device_reduce", re.IGNORECASE)
"""Matches names of operators (on a CPU) and kernels (on a GPU) that communicate."""

IDLE = 1.5  # seconds until the workers of an idle model stop polling


class ProfiledWorker:
    """Methods added to vLLM's workers that record their collectives with torch's profiler.

    Unlike wrappers, the profiler sees the operators in compiled graphs and the kernels in CUDA
    graphs.
    """

    vllm_config: Any

    def watch_collectives(self) -> None:
        """Start recording."""
        self._profile = profile(record_shapes=True)
        self._profile.start()

    def watched_collectives(self) -> list[tuple[str, int, float]]:
        """Stop recording; return kind, bytes and seconds of each collective, in order.

        The bytes are those passed to it; 0 for GPU kernels, where they are not known.
        """
        self._profile.stop()
        itemsize = self.vllm_config.model_config.dtype.itemsize
        device = "CUDA" if torch.cuda.is_available() else "CPU"
        profiler: Any = self._profile.profiler
        # the profiler's own `events()` takes 20 times as long and twice the memory
        events = profiler.kineto_results.events()
        found = []
        for event in sorted(events, key=lambda event: event.start_ns()):
            kind = KINDS.search(event.name())
            if kind and event.device_type().name == device:
                shape = next(filter(None, event.shapes() or ()), [0])
                sent = itemsize * prod(shape)
                found.append((kind.group().lower(), sent, event.duration_ns() / 1e9))
        return found


class TimedVllmModel:
    """A model loaded in vLLM, which starts its own processes for tensor parallelism."""

    def __init__(self, llm: LLM) -> None:
        """Time `llm`; it needs `ProfiledWorker` in its workers, log stats and no prefix caching."""
        self._llm = llm

    def seconds(self, case: Case) -> float:
        """Seconds of one run, by the engine's own clock; for `decode`, per token."""
        scheduled, first, last = self._run(case, self._tokens(case))
        if case.task is Task.decode:
            return (last - first) / DECODED
        return (first if case.task is Task.prefill else last) - scheduled

    def collectives(self, case: Case) -> Collectives | None:
        """The collectives of one rank in one more run, profiled; for `decode`, per token."""
        tokens = self._tokens(case)
        self._llm.collective_rpc("watch_collectives")
        scheduled, first, last = self._run(case, tokens)
        found = self._llm.collective_rpc("watched_collectives")[0]
        seconds, runs = last - scheduled, 1
        if case.task is Task.decode:  # drop the prompt's pass, the first of equal ones
            found, seconds, runs = found[len(found) // tokens :], last - first, DECODED
        if not found:
            return None
        return Collectives(
            {kind: count // runs for kind, count in Counter(each[0] for each in found).items()},
            sum(each[1] for each in found) // runs,
            sum(each[2] for each in found) / runs,
            sum(each[2] for each in found) / seconds,
        )

    def _tokens(self, case: Case) -> int:
        """Number of tokens that a run generates."""
        return {Task.prefill: 1, Task.generate: case.length, Task.decode: 1 + DECODED}[case.task]

    def _run(self, case: Case, tokens: int) -> tuple[float, float, float]:
        """Times when the prompts were scheduled, had their first token and their last token."""
        length = 1 if case.task is Task.generate else case.length
        vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        prompts = [
            {"prompt_token_ids": [(row * length + i) % vocabulary for i in range(length)]}
            for row in range(case.batch)
        ]
        options = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        time.sleep(IDLE)
        self._llm.sleep(
            level=0, mode="keep"
        )  # until all prompts are queued; else the first would run alone
        self._llm.enqueue(prompts, options, use_tqdm=False)
        self._llm.wake_up(tags=["scheduling"])
        times = [each.metrics for each in self._llm.wait_for_completion(use_tqdm=False)]
        preempted = any(getattr(each, "num_preemptions", 0) for each in times)  # not told by 0.29
        if len({each.scheduled_ts for each in times}) > 1 or preempted:
            raise TruedepthError(
                f"vLLM's KV cache has no room for {case.batch} sequences of {case.length} tokens at"
                " once; lower --batch, or on a CPU raise VLLM_CPU_KVCACHE_SPACE (GiB)."
            )
        return (
            min(each.scheduled_ts for each in times),
            max(each.first_token_ts for each in times),
            max(each.last_token_ts for each in times),
        )


def measure(setup: Setup, cases: list[Case], repetitions: int) -> list[Row]:
    """Time a model and its base, each loaded once and idle while the other runs.

    Args:
        setup: The models, and how they run; the device must be the one vLLM was built for.
        cases: Cases to time.
        repetitions: Timed runs of each model and case.

    Raises:
        TruedepthError: vLLM cannot load a model, or fails.
    """
    from vllm.platforms import current_platform

    if setup.device != current_platform.device_type:
        raise TruedepthError(
            f"This vLLM was built for {current_platform.device_type}, not for {setup.device}; give"
            f" --device {current_platform.device_type}."
        )
    assert setup.dtype is not None  # None is for llama.cpp only
    ranks = setup.ranks
    room, batch = max(case.length for case in cases) + 1 + DECODED, max(c.batch for c in cases)
    cores = sorted(os.sched_getaffinity(0))
    own = max(1, len(cores) // ranks)
    bound = [",".join(map(str, cores[i * own : (i + 1) * own])) for i in range(ranks)]
    for name, value in (
        ("VLLM_CPU_KVCACHE_SPACE", str(_cache_gib(setup.model, room * batch, setup.dtype))),
        ("VLLM_CPU_OMP_THREADS_BIND", "|".join(bound) if ranks <= len(cores) else "nobind"),
    ):
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {
        "tensor_parallel_size": ranks,
        "dtype": dtype_name(setup.dtype),
        "enforce_eager": setup.eager,
        "skip_tokenizer_init": True,
        "max_model_len": room,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(2048, room * batch),  # so that all prompts run in one pass
        "gpu_memory_utilization": 0.45 if setup.against else 0.9,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "worker_extension_cls": f"{__name__}.{ProfiledWorker.__name__}",
    }

    def timed(name: str) -> TimedVllmModel:
        source = open_source(name)
        source.tensors  # noqa: B018  # downloads the weights of a hub model
        return TimedVllmModel(LLM(model=str(source.path), **options))

    with tempfile.TemporaryFile("w+", errors="replace") as log, redirected(log, 1, 2):
        try:
            against = timed(setup.against) if setup.against else None
            return interleaved(timed(setup.model), against, cases, repetitions)
        except (RuntimeError, ValueError, OSError, EngineDeadError) as error:
            log.seek(0)
            causes = [found.group() for line in log if (found := re.search(r"\w+Error: .*", line))]
            said = causes[0] if causes else str(error).partition("[type=")[0]
            raise TruedepthError(f"vLLM failed: {' '.join(said.split())}", 1) from error


def _cache_gib(model: str, tokens: int, dtype: torch.dtype) -> int:
    """GiB of KV cache for `tokens` tokens, with room for partly filled blocks."""
    info = inspect_model(model)
    return ceil((tokens * 1.25 + 1024) * info.kv_elements_per_token * dtype.itemsize / (1 << 30))
