"""Copies the bytes of lazy tensors to their places in a file.

Several threads each read, compute and write blocks. What they call releases the interpreter's lock,
so one core computes while another waits for the disk. A tensor whose bytes lie unchanged in a file
is read from that file instead of its memory map: a file that was cut short is then an error, where
a map would end the process. Every value is looked at on its way: no NaN or infinity is written.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import BinaryIO

import torch
from torch import Tensor

from truedepth.tensors import LazyTensor, check_finite

BLOCK_BYTES = 1 << 20  # small enough to stay in cache and to be reused by the allocator
WORKERS = 2


class Copier:
    """Copies tensors into open files."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def copy(self, name: str, tensor: LazyTensor, file: int, offset: int) -> Iterator[int]:
        """Write a tensor.

        Args:
            name: Its name, for errors.
            tensor: Its rows are read once, in blocks, roughly from first to last.
            file: The descriptor of an open file.
            offset: Offset of the tensor's first byte in that file.

        Yields:
            The number of bytes of each block, when it is written.

        Raises:
            NotFiniteError: The tensor holds NaN or an infinity.
            OSError: The disk is full, or the file that holds the bytes was cut short.
        """
        row_bytes = tensor.nbytes // max(1, tensor.shape[0]) if tensor.shape else tensor.nbytes
        with tensor.stored.path.open("rb") if tensor.stored else nullcontext() as source:

            def write(rows: tuple[int, int]) -> int:
                block = tensor.rows(*rows) if source is None else _stored(tensor, source, *rows)
                check_finite(name, block, rows[0])
                return _write_block(file, offset + rows[0] * row_bytes, block)

            yield from self._pool.map(write, tensor.ranges(BLOCK_BYTES))


def _stored(tensor: LazyTensor, source: BinaryIO, start: int, stop: int) -> Tensor:
    """Rows of a tensor whose bytes lie in an open file."""
    assert tensor.stored is not None
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    row_bytes = math.prod(shape[1:]) * tensor.dtype.itemsize
    held, at = bytearray(math.prod(shape) * tensor.dtype.itemsize), tensor.stored.offset
    done = 0
    while done < len(held):
        read = os.preadv(source.fileno(), [memoryview(held)[done:]], at + start * row_bytes + done)
        if not read:
            raise OSError(errno.EIO, f"{tensor.stored.path} was cut short while it was read")
        done += read
    if not held:
        return torch.empty(shape, dtype=tensor.dtype)
    return torch.frombuffer(held, dtype=tensor.dtype).view(shape)


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
