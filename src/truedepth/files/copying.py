"""Copies the bytes of lazy tensors to their places in a file.

Several threads each read, compute and write blocks. What they call releases the interpreter's lock,
so one core computes while another waits for the disk. A tensor whose bytes lie unchanged in a file
is copied by the kernel and never enters this process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from truedepth.tensors import LazyTensor, Stored

BLOCK_BYTES = 1 << 20  # small enough to stay in cache and to be reused by the allocator
STORED_BYTES = 1 << 24  # per copy in the kernel
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
        if tensor.stored is not None:
            yield from self._stored(tensor.stored, tensor.nbytes, file, offset)
            return
        row_bytes = tensor.nbytes // max(1, tensor.shape[0]) if tensor.shape else tensor.nbytes

        def write(rows: tuple[int, int]) -> int:
            return _write_block(file, offset + rows[0] * row_bytes, tensor.rows(*rows))

        yield from self._pool.map(write, tensor.ranges(BLOCK_BYTES))

    def _stored(self, stored: Stored, size: int, file: int, offset: int) -> Iterator[int]:
        with stored.path.open("rb") as source:
            copy = partial(_copy_range, source.fileno(), file)

            def piece(start: int) -> int:
                count = min(STORED_BYTES, size - start)
                if copy(stored.offset + start, offset + start, count) < count:
                    raise OSError(errno.EIO, f"{stored.path} was cut short while it was read")
                return count

            yield from self._pool.map(piece, range(0, size, STORED_BYTES))


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


def _copy_range(source: int, target: int, start: int, offset: int, count: int) -> int:
    """Copy bytes from file to file; returns fewer than `count` only at the source's end."""
    done = 0
    while done < count:
        at, to, left = start + done, offset + done, count - done
        try:
            copied = os.copy_file_range(source, target, left, at, to)
        except (AttributeError, OSError):  # not on this system, or not between these two files
            copied = os.pwrite(target, os.pread(source, min(left, BLOCK_BYTES), at), to)
        if not copied:
            break
        done += copied
    return done


def _write_block(file: int, offset: int, block: Tensor) -> int:
    raw = block.contiguous().reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(raw):
        done += os.pwrite(file, raw[done:], offset + done)
    return done
