"""`truedepth bench`: how fast a model is on an engine, compared with its base."""

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
from truedepth.progress import note, working
from truedepth.runtime.device import device_of, fast_dtype
from truedepth.sources.opening import open_source
from truedepth.speed.ranks import check_accelerator
from truedepth.speed.timing import REPETITIONS, Case, Engine, Row, Setup, Task
from truedepth.tensors import dtype_name
from truedepth.text import positions_of
from truedepth.widening.padding import check_heads


@dataclass(frozen=True)
class Benchmark:
    """What `bench` measured, and how."""

    setup: Setup
    engine: str
    version: str
    """Version of the engine."""

    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """The setup and all rows as JSON-compatible data."""
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
    fuse: bool = False,
    repetitions: Annotated[int, Bounds(1)] = REPETITIONS,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Benchmark:
    """Time a model and its base on an engine, in turn (A B A B …).

    Every task is timed at every combination of length and batch size.

    Args:
        model: What `load` takes; for vLLM a directory or a hub id, for llama.cpp a GGUF file.
        against: The base, likewise; default: the model is timed alone.
        tasks: Tasks to time.
        lengths: Numbers of tokens; see `Task`.
        batches: Numbers of sequences that run at a time.
        engine: Engine that runs the models.
        ranks: Tensor-parallel size; its processes are started here.
        eager: Compile nothing. Default: vLLM compiles, and so does transformers on a GPU.
        fuse: Fuse the stages of both models first, as `truedepth.fuse` does; transformers only.
        repetitions: Timed runs of each model and case.
        device: As in `load`; for vLLM it must be the one that vLLM was built for.
        dtype: Dtype of both models. Default: on a CPU bfloat16 if it is fast there, else float32;
            on a GPU the dtype of the model's weights. Must be None for llama.cpp.

    Raises:
        TruedepthError: A number is below 1, options contradict each other, or the engine cannot run
            a model.
    """
    if not (tasks and lengths and batches):
        raise TruedepthError("Give at least one task, one length and one batch.")
    where = device_of(device)
    check_accelerator(ranks, where)
    in_llama_cpp = engine is Engine.llama_cpp
    if in_llama_cpp and (ranks > 1 or dtype):
        raise TruedepthError(
            "llama.cpp runs a file with its own types in one process; drop --tp and --dtype."
        )
    setup = Setup(
        model=str(model),
        against=None if against is None else str(against),
        ranks=ranks,
        device=str(where),
        dtype=None if in_llama_cpp else dtype or fast_dtype(open_source(model), where),
        eager=eager,
        fuse=fuse,
    )
    _check_models(setup, engine)
    cases = [Case(task, n, batch) for task in tasks for n in lengths for batch in batches]
    measure, version = _engine(engine)
    with working(f"Timing {len(cases)} cases"):
        rows = measure(setup, cases, repetitions)
    for name in filter(None, (setup.model, setup.against)):
        positions = positions_of(open_source(name).config)
        if positions is not None and max(lengths) > positions:
            note(f"{max(lengths)} tokens are more than the {positions} positions of {name}.")
    return Benchmark(setup, engine.value, version, rows)


def _check_models(setup: Setup, engine: Engine) -> None:
    """Refuse what an engine cannot run.

    Raises:
        TruedepthError: It cannot.
    """
    if setup.fuse and engine is not Engine.transformers:
        raise TruedepthError(
            f"--fuse goes with --engine transformers; {engine.value} joins maps by itself."
        )
    in_llama_cpp = engine is Engine.llama_cpp
    for name in filter(None, (setup.model, setup.against)):
        source = open_source(name)
        plan = plan_of(source.config)
        if plan and plan.ranks not in (None, setup.ranks):
            raise TruedepthError(
                f"{name} has stages that are local to {plan.ranks} tensor-parallel ranks; give --tp"
                f" {plan.ranks}."
            )
        check_heads(source, setup.ranks)
        if in_llama_cpp and source.path.is_dir():
            raise TruedepthError(f"{name} is not a GGUF file; write one with truedepth export.")
        if source.path.is_file() and (setup.ranks > 1 or engine is Engine.vllm):
            raise TruedepthError(
                f"{name} is a GGUF file, which {engine.value} cannot run here; convert it first"
                " (truedepth convert --pairs 0 keeps the model as it is)."
            )
        if source.path.is_file() and plan and not in_llama_cpp:
            raise TruedepthError(f"{name} runs only in llama.cpp; give --engine llama.cpp.")


def _engine(engine: Engine) -> tuple[Callable[..., list[Row]], str]:
    """The engine's function `measure`, and its version."""
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
        raise TruedepthError("vLLM is not installed: pip install 'truedepth[vllm]'.") from None
    from truedepth.speed.vllm import measure as measure_vllm

    return measure_vllm, vllm.__version__
