"""The device that a model runs on, and its dtype."""

from __future__ import annotations

import torch

from truedepth.errors import TruedepthError
from truedepth.sources.source import Source
from truedepth.tensors import common_dtype


def default_device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(source: Source, device: torch.device) -> torch.dtype:
    """The dtype in which a model computes fast.

    On a CPU: bfloat16 if the processor has instructions for it, which are several times faster
    than float32, else float32. On a GPU: the dtype of the checkpoint's matrices.
    """
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16") or can.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    return common_dtype([t for t in source.tensors.values() if len(t.shape) > 1])


def device_of(name: str | torch.device | None) -> torch.device:
    """Resolve a device's name; default: the first GPU, else the CPU.

    Raises:
        TruedepthError: This machine has no such device.
    """
    name = name or default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise TruedepthError(f"This machine has no device {str(name)!r}.") from error
    return device
