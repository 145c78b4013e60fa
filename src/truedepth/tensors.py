"""Tensors that are read on demand, a block of rows at a time.

Checkpoints are larger than memory, so everything between reading and writing one is built from
`LazyTensor`: a shape, a dtype, and a function that returns any range of rows. Combining lazy
tensors gives a lazy tensor; nothing is read until rows are asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from truedepth.errors import TruedepthError


@dataclass(frozen=True)
class Stored:
    """Where a file holds a tensor's bytes, contiguously, from byte `offset` on."""

    path: Path
    offset: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype whose rows (first dimension) are read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]
    """`rows(start, stop)`: rows start to stop - 1, as `[stop - start, *shape[1:]]`."""

    stored: Stored | None = None
    """Where a file holds exactly these bytes; None if no file does."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.rows(0, self.shape[0] if self.shape else 1)

    def ranges(self, max_bytes: int) -> Iterator[tuple[int, int]]:
        """`(start, stop)` of consecutive blocks of rows: at most `max_bytes`, at least one row."""
        count = self.shape[0] if self.shape else 1
        step = max(1, max_bytes * count // max(1, self.nbytes))
        for start in range(0, count, step):
            yield start, min(start + step, count)

    def blocks(self, max_bytes: int) -> Iterator[Tensor]:
        """The rows from first to last, in the blocks that `ranges` gives."""
        for start, stop in self.ranges(max_bytes):
            yield self.rows(start, stop)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same values rounded to `dtype`."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda start, stop: self.rows(start, stop).to(dtype))

    def row_range(self, first: int, last: int) -> LazyTensor:
        """Rows `first` to `last - 1`: `[last - first, *shape[1:]]`."""
        shape = (last - first, *self.shape[1:])
        return LazyTensor(
            shape, self.dtype, lambda start, stop: self.rows(first + start, first + stop)
        )


def from_tensor(tensor: Tensor, stored: Stored | None = None) -> LazyTensor:
    """A tensor that is already in memory, or mapped into it, as a lazy tensor."""
    return LazyTensor(
        tuple(tensor.shape),
        tensor.dtype,
        lambda start, stop: tensor[start:stop] if tensor.shape else tensor,
        stored,
    )


class NotFiniteError(TruedepthError):
    """A tensor holds NaN or an infinity."""

    def __init__(self, name: str, row: int, value: float) -> None:
        """Say where.

        Args:
            name: The tensor's name.
            row: Index along its first dimension.
            value: What is there.
        """
        super().__init__(f"{name!r} would hold {value} in row {row}; it is not written.", 1)
        self.name, self.row, self.value = name, row, value


def check_finite(name: str, block: Tensor, first: int = 0) -> None:
    """Raise NotFiniteError if a block of a tensor's rows holds NaN or an infinity.

    Args:
        name: The tensor's name.
        block: `[rows, …]`, or one number.
        first: The index of its first row.
    """
    if not block.is_floating_point():
        return
    values = block if block.itemsize > 1 else block.float()  # torch computes little with float8
    # A sum is finite only if all its terms are, and takes a fiftieth of the time of `isfinite` for
    # 16-bit numbers. If it overflows, every value is looked at.
    if values.sum().isfinite() or values.isfinite().all():
        return
    rows = values.reshape(len(block) if block.ndim else 1, -1).float()
    row, column = (~rows.isfinite()).nonzero()[0].tolist()
    raise NotFiniteError(name, first + row, rows[row, column].item())


def first_not_finite(name: str, tensor: LazyTensor) -> NotFiniteError | None:
    """Where a tensor holds NaN or an infinity; None if it holds neither. Reads all of it."""
    try:
        for start, stop in tensor.ranges(1 << 22):
            check_finite(name, tensor.rows(start, stop), start)
    except NotFiniteError as error:
        return error
    return None


def remembered(tensor: LazyTensor) -> LazyTensor:
    """The same tensor, read once and whole on first use: for small tensors with many readers."""
    lock, held = threading.Lock(), list[Tensor]()

    def rows(start: int, stop: int) -> Tensor:
        with lock:
            if not held:
                held.append(tensor.read())
        return held[0][start:stop]

    return LazyTensor(tensor.shape, tensor.dtype, rows)


def constant(value: float, size: int, dtype: torch.dtype) -> LazyTensor:
    """`[size]`, every element `value`."""
    return LazyTensor(
        (size,), dtype, lambda start, stop: torch.full((stop - start,), value, dtype=dtype)
    )


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """A tensor of zeros."""
    return LazyTensor(
        shape, dtype, lambda start, stop: torch.zeros(stop - start, *shape[1:], dtype=dtype)
    )


def stack_rows(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors `[r_i, …]` one under another: `[Σ r_i, …]`."""

    def rows(start: int, stop: int) -> Tensor:
        pieces, offset = [], 0
        for part in parts:
            low, high = max(start - offset, 0), min(stop - offset, part.shape[0])
            if low < high:
                pieces.append(part.rows(low, high))
            offset += part.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyTensor(shape, common_dtype(parts), rows)


def join_columns(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Matrices `[r, c_i]` side by side: `[r, Σ c_i]`."""
    shape = (parts[0].shape[0], sum(part.shape[1] for part in parts))
    return LazyTensor(
        shape,
        common_dtype(parts),
        lambda start, stop: torch.cat([part.rows(start, stop) for part in parts], dim=1),
    )


def pick_rows(tensor: LazyTensor, order: Tensor) -> LazyTensor:
    """`[len(order), …]`: the rows whose indices `order` lists, in that order.

    For each block, everything from its lowest to its highest row is read.
    """

    def rows(start: int, stop: int) -> Tensor:
        picked = order[start:stop]
        first, last = int(picked.min()), int(picked.max())
        return tensor.rows(first, last + 1)[picked - first]

    return LazyTensor((len(order), *tensor.shape[1:]), tensor.dtype, rows)


def scale_columns(
    matrix: LazyTensor,
    scale: LazyTensor,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
) -> LazyTensor:
    """`W diag(g + offset)`: column j of `matrix` `[r, c]` times element j of `scale` `[c]`.

    Computed in float32 and rounded to `dtype` once.
    """
    # torch multiplies 16-bit numbers in float32 and rounds the product: the same in one pass.
    small = dtype in (torch.bfloat16, torch.float16) and {matrix.dtype, scale.dtype} == {dtype}
    working = dtype if small and not offset else torch.float32

    def rows(start: int, stop: int) -> Tensor:
        gains = scale.read().to(working)
        return (matrix.rows(start, stop).to(working) * (gains + offset if offset else gains)).to(
            dtype
        )

    return LazyTensor(matrix.shape, dtype, rows)


def scale_rows(tensor: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """Row i of `tensor` `[r, …]` times element i of `scale` `[r]`, in float32, not rounded."""

    def rows(start: int, stop: int) -> Tensor:
        values = tensor.rows(start, stop).to(torch.float32)
        each = scale.rows(start, stop).to(torch.float32)
        return values * each.view(-1, *(1 for _ in tensor.shape[1:]))

    return LazyTensor(tensor.shape, torch.float32, rows)


def add(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The sum of tensors of one shape, in float32, not rounded."""

    def rows(start: int, stop: int) -> Tensor:
        return torch.stack([part.rows(start, stop).to(torch.float32) for part in parts]).sum(0)

    return LazyTensor(parts[0].shape, torch.float32, rows)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`, as config.json writes it."""
    return str(dtype).removeprefix("torch.")


def common_dtype(parts: Sequence[LazyTensor]) -> torch.dtype:
    """The dtype to which torch promotes those of all parts."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    return dtype
