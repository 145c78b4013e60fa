"""Tensors of a memory-mapped file, requested from the disk ahead of their use.

A map alone is read page by page as it is touched, with the disk idle in between; two tensors that
are read in turn, as in a group, are the worst case.
"""

from __future__ import annotations

import contextlib
import os

from torch import Tensor

from truedepth.tensors import LazyTensor, Stored, from_tensor

AHEAD_BYTES = 1 << 23


def mapped_tensor(tensor: Tensor, stored: Stored) -> LazyTensor:
    """A lazy tensor of one that lies on a file's memory map.

    Args:
        tensor: The tensor on the map.
        stored: Its place in the file.
    """
    lazy = from_tensor(tensor, stored)
    count = lazy.shape[0] if lazy.shape else 1
    row_bytes = lazy.nbytes // max(1, count)

    def rows(start: int, stop: int) -> Tensor:
        # What is read in blocks is requested once, two chunks ahead. A caller that takes the whole
        # tensor may want only the map.
        begin = (start * row_bytes // AHEAD_BYTES + 2) * AHEAD_BYTES if start else 0
        end = min((stop * row_bytes // AHEAD_BYTES + 2) * AHEAD_BYTES, lazy.nbytes)
        if begin < end and (start, stop) != (0, count):
            _will_need(stored, begin, end - begin)
        return lazy.rows(start, stop)

    return LazyTensor(lazy.shape, lazy.dtype, rows, stored)


def _will_need(stored: Stored, begin: int, count: int) -> None:
    """Have the system read from the disk, without waiting for it."""
    with contextlib.suppress(AttributeError, OSError):  # only advice; some systems lack it
        file = os.open(stored.path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, stored.offset + begin, count, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)
