"""`truedepth bench`: how fast a model is on an engine, beside its base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from truedepth.errors import TruedepthError
from truedepth.options import Bounds, checked
from truedepth.plan.config import plan_of
from truedepth.progress import working
from truedepth.runtime.device import device_of, fast_dtype
from truedepth.sources.opening import open_source
from truedepth.speed.ranks import check_accelerator
from truedepth.speed.timing import REPETITIONS, Case, Engine, Row, Setup, Task
from truedepth.tensors import dtype_name
from truedepth.widening.padding import check_heads


@dataclass(frozen=True)
class Benchmark:
    """What `truedepth bench` prints."""

    setup: Setup
    engine: str
    version: str
    """Of the engine."""

    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self.setup),
            "dtype": dtype_name(self.setup.dtype) if self.setup.dtype else None,
            "engine": self.engine,
            "version": self.version,
            "rows": [row.to_dict() for row in self.rows],
        }


@checked
def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    tasks: Sequence[Task] = tuple(Task),
    lengths: Annotated[Sequence[int], Bounds(1)] = (128,),
    batches: Annotated[Sequence[int], Bounds(1)] = (1,),
    engine: Engine = Engine.transformers,
    ranks: Annotated[int, Bounds(1)] = 1,
    eager: bool = False,
    repetitions: Annotated[int, Bounds(1)] = REPETITIONS,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Benchmark:
    """Time a model, and its base in turn with it.

    Args:
        model: What `load` takes; for vLLM a directory or a hub id, for llama.cpp a GGUF file.
        against: The base, likewise; default: the model is timed alone.
        tasks: What to time.
        lengths: Tokens; every task at each.
        batches: Sequences at a time; every length at each.
        engine: What runs them.
        ranks: Tensor-parallel size; this call starts the processes.
        eager: Compile nothing. Default: vLLM compiles, and so does transformers on a GPU.
        repetitions: Timed runs of each model and case.
        device: As in `load`; vLLM has the one that it was built for.
        dtype: Of both; by default bfloat16 on CPUs that are fast at it and float32 on others, on a
            GPU that of the model's weights. Not for llama.cpp, where files have their own types.

    Raises:
        TruedepthError: An option makes no sense, or a model cannot be run so.
    """
    if not (tasks and lengths and batches):
        raise TruedepthError("Give at least one task, one length and one batch.")
    where = device_of(device)
    check_accelerator(ranks, where)
    in_llama_cpp = engine is Engine.llama_cpp
    if in_llama_cpp and (ranks > 1 or dtype):
        raise TruedepthError(
            "llama.cpp runs files as they are, in one process: no --tp or --dtype."
        )
    setup = Setup(
        model=str(model),
        against=None if against is None else str(against),
        ranks=ranks,
        device=str(where),
        dtype=None if in_llama_cpp else dtype or fast_dtype(open_source(model), where),
        eager=eager,
    )
    for name in filter(None, (setup.model, setup.against)):
        source = open_source(name)
        check_heads(source, ranks)
        if in_llama_cpp and source.path.is_dir():
            raise TruedepthError(f"{name} is no GGUF file; write one with truedepth export.")
        if source.path.is_file() and (ranks > 1 or engine is Engine.vllm):
            raise TruedepthError(
                f"{name} is a GGUF file, which {engine.value} cannot run here; convert it"
                " (--pairs 0 as it is)."
            )
        if source.path.is_file() and plan_of(source.config) and not in_llama_cpp:
            raise TruedepthError(f"{name} runs in llama.cpp: give --engine llama.cpp.")
    cases = [Case(task, n, batch) for task in tasks for n in lengths for batch in batches]
    measure, version = _engine(engine)
    with working(f"Timing {len(cases)} cases"):
        rows = measure(setup, cases, repetitions)
    return Benchmark(setup, engine.value, version, rows)


def _engine(engine: Engine) -> tuple[Callable[..., list[Row]], str]:
    """How it measures, and its version."""
    if engine is Engine.transformers:
        import transformers

        from truedepth.speed.transformers import measure

        return measure, transformers.__version__
    if engine is Engine.llama_cpp:
        from truedepth.runtime.llama_cpp import library
        from truedepth.speed.llama_cpp import measure as measure_llama_cpp

        return measure_llama_cpp, library().__version__
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError:
        raise TruedepthError("There is no vLLM here: pip install 'truedepth[vllm]'.") from None
    from truedepth.speed.vllm import measure as measure_vllm

    return measure_vllm, vllm.__version__
