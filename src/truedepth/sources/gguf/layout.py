"""Names and row order that truedepth and llama.cpp use in GGUF files."""

from __future__ import annotations

import gguf
import numpy as np

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "deci": gguf.MODEL_ARCH.DECI}
"""Supported architectures; `deci` only as truedepth exports it: a layer-parallel checkpoint."""


CONFIG, GENERATION_CONFIG = "truedepth.config", "truedepth.generation_config"
"""Metadata keys of an export: the checkpoint's config.json and generation_config.json."""


def to_llama_cpp(rows: int, heads: int) -> np.ndarray:
    """`[rows]`: for each row of llama.cpp's q or k map, the index of transformers' row.

    RoPE pairs neighbouring rows in llama.cpp, and the two halves of a head in transformers.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def from_llama_cpp(rows: int, heads: int) -> np.ndarray:
    """`[rows]`: for each row of transformers' q or k map, the index of llama.cpp's row."""
    return np.argsort(to_llama_cpp(rows, heads))
