"""Where a model runs, and in which dtype."""

from __future__ import annotations

import torch

from truedepth.errors import TruedepthError
from truedepth.sources.source import Source
from truedepth.tensors import common_dtype


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_dtype(source: Source, device: torch.device) -> torch.dtype:
    """On a CPU bfloat16 where that is several times faster than float32, else float32; on a GPU the
    checkpoint's.
    """
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        fast = can.get("avx512_bf16") or can.get("amx_bf16")
        return torch.bfloat16 if fast else torch.float32
    return common_dtype([t for t in source.tensors.values() if len(t.shape) > 1])


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of that name, by default the first GPU or else the CPU.

    Raises:
        TruedepthError: There is no such device.
    """
    name = name or default_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise TruedepthError(f"There is no device {str(name)!r} on this machine.") from error
    return device
