"""Tensors that lie in files instead of memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor


def mapped(directory: Path, name: str | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that is the memory map of a file; what is written to it is in the file.

    The disk space is taken now, so a full disk is an error here and not a crash at a later write.

    Args:
        directory: An existing directory for the file.
        name: The file's name. A file that exists keeps its contents. None for a temporary file,
            which has no name once it is mapped: its space is freed with the tensor, or when the
            process ends, however it ends.
        shape: Any, with at least one element.
        dtype: Any.

    Returns:
        `shape`, zeros where nothing was written before.

    Raises:
        OSError: The file cannot be opened, or the disk is full.
    """
    count = prod(shape)
    with (
        tempfile.NamedTemporaryFile(dir=directory)
        if name is None
        else (directory / name).open("ab") as file
    ):
        os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(*shape)
