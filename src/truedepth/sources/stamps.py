"""Whether the files of a source are still those that were opened.

Tensors are read from a file's memory map during writing or training, which can take hours. A file
that is overwritten meanwhile would give a mixture of two models, and one that is cut short would
end the process (SIGBUS). So the size and modification time of every file are recorded when it is
opened, and compared before every block that is read and once more before a result is kept.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from truedepth.errors import TruedepthError
from truedepth.tensors import LazyTensor


class Stamps:
    """Sizes (bytes) and modification times (ns) of files when they were first opened."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[int, int] | None] = {}

    def add(self, file: Path) -> None:
        """Record a file that is about to be opened, unless it is recorded already."""
        if file not in self._found:
            self._found[file] = _stamp(file)

    def check(self, *files: Path) -> None:
        """Raise TruedepthError if one of these files (by default, of all) has changed since."""
        for file in files or self._found:
            if _stamp(file) != self._found[file]:
                raise TruedepthError(
                    f"{file} changed while it was read; nothing that was read from it was kept."
                    " Run the same command again when the file is complete.",
                    exit_code=1,
                )

    def watched(self, file: Path, tensor: LazyTensor) -> LazyTensor:
        """The tensor, which now checks its file before every block."""

        def rows(start: int, stop: int) -> torch.Tensor:
            self.check(file)
            return tensor.rows(start, stop)

        return replace(tensor, rows=rows)


def _stamp(file: Path) -> tuple[int, int] | None:
    """None for a file that does not exist, or no longer does."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
