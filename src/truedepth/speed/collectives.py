"""What tensor parallelism sends: its collectives counted, timed, delayed as by a longer wire.

Reaches the collectives that Python code asks for, as transformers' tensor parallelism does; not
those of compiled graphs or of engines with kernels of their own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

IN_PLACE = ("all_reduce",)
"""Of torch.distributed, the sent tensor first."""

FUNCTIONAL = ("all_reduce", "all_gather_single", "reduce_scatter_single")
"""Of its functional collectives, likewise."""


@dataclass
class Traffic:
    """Of one process."""

    calls: Counter[str] = field(default_factory=Counter)
    """By kind: `all_reduce`, `all_gather`, `reduce_scatter`."""

    bytes: int = 0
    """That this process gave to them."""

    seconds: float = 0.0
    """That it spent in them, waiting for the other processes included."""


@contextmanager
def watched(delay: float = 0.0) -> Iterator[Traffic]:
    """Watch this process's collectives; each is waited for.

    Args:
        delay: Seconds that every one of them takes longer.
    """
    traffic = Traffic()

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        kind = name.removesuffix("_single")

        def watching(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            if tensor.is_cuda:  # what was asked for before is not its time
                torch.cuda.synchronize(tensor.device)
            start = time.perf_counter()
            result = call(tensor, *arguments, **options)
            if isinstance(result, functional.AsyncCollectiveTensor):
                result = result.wait()
            if tensor.is_cuda:
                torch.cuda.synchronize(tensor.device)
            end = time.perf_counter() + delay
            while time.perf_counter() < end:  # sleeping is not fine-grained enough
                pass
            traffic.calls[kind] += 1
            traffic.bytes += tensor.nbytes
            traffic.seconds += time.perf_counter() - start
            return result

        return watching

    places = [(dist, name) for name in IN_PLACE] + [(functional, name) for name in FUNCTIONAL]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    try:
        for place, name, call in kept:
            setattr(place, name, watch(name, call))
        yield traffic
    finally:
        for place, name, call in kept:
            setattr(place, name, call)
