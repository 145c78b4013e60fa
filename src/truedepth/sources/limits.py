"""Bounds on what a model's files may say; every real model stays far below them.

A file from elsewhere may hold any number, and a list or a model as large as a false number says
fills memory. So sizes are checked before anything of that size is made.
"""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.plan.plan import MAX_LAYERS
from truedepth.sources.fetched import check_fetched

# A character of JSON can become 24 bytes of Python objects, `[{},{},…`.
MAX_CONFIG_BYTES = 2 << 20
MAX_INDEX_BYTES = 24 << 20  # an index of 100,000 tensors takes 10 MB
MAX_TOKENIZER_BYTES = 64 << 20  # Gemma's, with 262,144 tokens, takes 33 MB

MAX_SIZES = {
    "num_hidden_layers": MAX_LAYERS,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 21,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 40,
}

HUB_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "use_kernels")
"""Keys of config.json that make transformers fetch compiled code from the hub and run it."""


def read_json(path: Path, missing: str = "There is no", most: int = MAX_INDEX_BYTES) -> Any:
    """The JSON object in a file of at most `most` bytes, as a dict.

    Raises:
        TruedepthError: The file is missing (`missing` begins the sentence), is not fetched yet, is
            too large, or does not hold a JSON object.
    """
    check_fetched(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a link to /dev/zero has no size and no end
            raise TruedepthError(f"{path} is not a file.")
        if found.st_size > most:
            raise TruedepthError(f"{path} is too large: {found.st_size} bytes, more than {most}.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TruedepthError(f"{missing} {path.name}.") from error
    except OSError as error:
        raise TruedepthError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise TruedepthError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise TruedepthError(f"{path} does not hold a JSON object.")
    return data


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a config.json with sizes out of bounds, or one that asks for code from the hub.

    Raises:
        TruedepthError: A size is missing, not a whole number, or out of bounds, or a key asks for
            code from the hub.
    """
    for key, most in MAX_SIZES.items():
        value = config.get(key)
        needed = key in ("num_hidden_layers", "hidden_size")
        if value is None and not needed:
            continue
        if type(value) is not int or value < 1:
            raise TruedepthError(
                f"The config of {where} must give {key} as a whole number of at least 1, not"
                f" {reprlib.repr(value)}."
            )
        if value > most:
            raise TruedepthError(
                f"The config of {where} gives {key} as {reprlib.repr(value)}, more than the {most}"
                " that are allowed."
            )
    for key in HUB_CODE:
        if key in config and (key == "use_kernels" or "/" in str(config[key])):
            raise TruedepthError(
                f"The config of {where} asks for code from the hub under {key!r}"
                f" ({reprlib.repr(config[key])}), which is never run; remove the key."
            )
