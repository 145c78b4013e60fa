"""Copies the bytes of lazy tensors to their places in a file.

Several threads each read, compute and write blocks. What they call releases the interpreter's lock,
so one core computes while another waits for the disk. Tensors that do not change come from a file's
memory map in the same way: that is faster than a copy by the kernel, and their values are seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from truedepth.tensors import LazyTensor

BLOCK_BYTES = 1 << 20  # small enough to stay in cache and to be reused by the allocator
WORKERS = 2


class Copier:
    """Copies tensors into open files."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def copy(self, tensor: LazyTensor, file: int, offset: int) -> Iterator[int]:
        """Write a tensor.

        Args:
            tensor: Its rows are read once, in blocks, roughly from first to last.
            file: The descriptor of an open file.
            offset: Offset of the tensor's first byte in that file.

        Yields:
            The number of bytes of each block, when it is written.
        """
        row_bytes = tensor.nbytes // max(1, tensor.shape[0]) if tensor.shape else tensor.nbytes

        def write(rows: tuple[int, int]) -> int:
            return _write_block(file, offset + rows[0] * row_bytes, tensor.rows(*rows))

        yield from self._pool.map(write, tensor.ranges(BLOCK_BYTES))


@contextmanager
def copier() -> Iterator[Copier]:
    """A `Copier`, for one or more files."""
    threads = torch.get_num_threads()
    begin: Callable[[int], object] = torch.set_num_threads
    try:
        # One thread per block: for blocks this small, sharing one would cost more than it saves.
        with ThreadPoolExecutor(WORKERS, initializer=begin, initargs=(1,)) as pool:
            yield Copier(pool)
    finally:
        torch.set_num_threads(threads)  # workers change the default of later threads too


def _write_block(file: int, offset: int, block: Tensor) -> int:
    raw = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(raw):
        done += os.pwrite(file, raw[done:], offset + done)
    return done
