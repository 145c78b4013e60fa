"""What was kept of the modules of a model that ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

CLOSE = 1e-4
"""Two tensors are the same if they differ by no more than this share of the largest value."""


@dataclass(frozen=True)
class Call:
    """A module that ran: its name in the layer, what it read and gave."""

    name: str
    read: Tensor
    gave: Tensor


@dataclass(frozen=True)
class RanLayer:
    """A layer that ran."""

    module: nn.Module
    x: Tensor
    args: tuple[Any, ...]
    call: dict[str, Any]
    y: Tensor
    children: tuple[Call, ...]


def tensor_of(output: Any) -> Any:
    """What a module gives; of several things, the first."""
    return output[0] if isinstance(output, tuple | list) else output


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    if one.shape != other.shape:
        return False
    return bool((one - other).abs().max() <= CLOSE * other.abs().max())


def same_rows(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for how their rows are arranged."""
    if one.numel() != other.numel():
        return False
    return same(one.reshape(other.shape), other)
