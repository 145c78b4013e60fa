"""Counts, times and delays the collectives of tensor parallelism.

This covers collectives that Python code calls, as transformers' tensor parallelism does, but not
those in compiled graphs or in engines with their own kernels.
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
"""Functions of torch.distributed; their first argument is the tensor that is sent."""

FUNCTIONAL = ("all_reduce", "all_gather_single", "reduce_scatter_single")
"""Functions of its functional collectives; likewise the first argument is the tensor."""


@dataclass
class Traffic:
    """The collectives of one process."""

    calls: Counter[str] = field(default_factory=Counter)
    """Number of calls by kind: `all_reduce`, `all_gather`, `reduce_scatter`."""

    bytes: int = 0
    """Bytes that this process passed to them."""

    seconds: float = 0.0
    """Seconds that this process spent in them, including waiting for other processes."""


@contextmanager
def watched(delay: float = 0.0) -> Iterator[Traffic]:
    """Record this process's collectives; each call returns only when it has finished.

    Args:
        delay: Seconds by which every call is prolonged, as a slower link would.
    """
    traffic = Traffic()

    def watch(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        kind = name.removesuffix("_single")

        def watching(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            if tensor.is_cuda:  # earlier kernels must not count as its time
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

    found = [(dist, name) for name in IN_PLACE] + [(functional, name) for name in FUNCTIONAL]
    kept = [(module, name, getattr(module, name)) for module, name in found]
    try:
        for module, name, call in kept:
            setattr(module, name, watch(name, call))
        yield traffic
    finally:
        for module, name, call in kept:
            setattr(module, name, call)
