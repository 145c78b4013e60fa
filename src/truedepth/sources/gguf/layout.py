"""Where truedepth and llama.cpp keep the same things in a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np

if TYPE_CHECKING:
    pass


ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "deci": gguf.MODEL_ARCH.DECI}
"""The second only as truedepth writes it: a layer-parallel checkpoint."""


CONFIG, GENERATION_CONFIG = "truedepth.config", "truedepth.generation_config"
"""Metadata of such a file: the checkpoint's config.json and generation_config.json."""


def to_llama_cpp(rows: int, heads: int) -> np.ndarray:
    """`[rows]`: the row of transformers' queries or keys in each place of llama.cpp's.

    llama.cpp rotates neighbouring rows, transformers the two halves of a head.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def from_llama_cpp(rows: int, heads: int) -> np.ndarray:
    """`[rows]`: the other way round."""
    return np.argsort(to_llama_cpp(rows, heads))
