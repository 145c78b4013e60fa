"""Tensors of a file that is mapped into memory, asked for ahead of their use.

A map by itself is read page by page as it is touched, with the disk idle in between; two tensors
that are read in turn, as in a group, are the worst case of it.
"""

from __future__ import annotations

import contextlib
import os

from torch import Tensor

from truedepth.tensors import LazyTensor, Stored, from_tensor

AHEAD_BYTES = 1 << 23


def mapped_tensor(tensor: Tensor, stored: Stored) -> LazyTensor:
    """A tensor that shares a file's map.

    Args:
        tensor: On the map.
        stored: Where in which file.
    """
    lazy = from_tensor(tensor, stored)
    count = lazy.shape[0] if lazy.shape else 1
    row_bytes = lazy.nbytes // max(1, count)

    def rows(start: int, stop: int) -> Tensor:
        # What is read in blocks is asked for once, two chunks ahead. Who takes the whole may want
        # the map only.
        begin = (start * row_bytes // AHEAD_BYTES + 2) * AHEAD_BYTES if start else 0
        end = min((stop * row_bytes // AHEAD_BYTES + 2) * AHEAD_BYTES, lazy.nbytes)
        if begin < end and (start, stop) != (0, count):
            _will_need(stored, begin, end - begin)
        return lazy.rows(start, stop)

    return LazyTensor(lazy.shape, lazy.dtype, rows, stored)


def _will_need(stored: Stored, begin: int, count: int) -> None:
    """Have the system read from the disk, and do not wait for it."""
    with contextlib.suppress(AttributeError, OSError):  # only advice, and not on every system
        file = os.open(stored.path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, stored.offset + begin, count, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)
