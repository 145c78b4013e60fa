"""Bounds on what a model's files may say; every real model stays far below them.

A file from elsewhere may hold any number, and a list or a model as large as a false number says
fills memory. So sizes are checked before anything of that size is made.
"""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from truedepth.errors import TruedepthError
from truedepth.families.family import KEY_VALUE, QUERY
from truedepth.families.lookup import known_original_family
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

ROPE = ("rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")
ROPE_SETTINGS = ("rope_parameters", "rope_scaling")
"""Keys of config.json whose values transformers computes with before it looks at their types."""

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
    """Refuse a config.json with values that no model has, or one that asks for code from the hub.

    What transformers' own classes refuse by name, such as a text for an epsilon, is left to them.

    Raises:
        TruedepthError: A size is missing, not a whole number, or out of bounds, a list or a rotary
            setting is not for this model, or a key asks for code from the hub.
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
    _check_heads(config, where)
    _check_lists(config, where)
    _check_rope(config, where)
    for key in HUB_CODE:
        if key in config and (key == "use_kernels" or "/" in str(config[key])):
            raise TruedepthError(
                f"The config of {where} asks for code from the hub under {key!r}"
                f" ({reprlib.repr(config[key])}), which is never run; remove the key."
            )


def _check_heads(config: Mapping[str, Any], where: Path) -> None:
    heads, key_value = config.get(QUERY), config.get(KEY_VALUE)
    if heads and key_value and heads % key_value:
        raise TruedepthError(
            f"The config of {where} gives {QUERY} as {heads}, which is not a multiple of"
            f" {KEY_VALUE}, {key_value}; correct the one that is wrong."
        )


def _check_lists(config: Mapping[str, Any], where: Path) -> None:
    """Refuse lists that tools which cut or join layers left as they were.

    transformers takes no list of layer types of another length. Of other lists it does not read
    what lies behind the last layer.
    """
    family = known_original_family(config)
    layers = config["num_hidden_layers"]
    for key in family.per_layer if family else ():
        entries = config.get(key)
        if not isinstance(entries, list) or len(entries) == layers:
            continue
        if key == "layer_types" or len(entries) < layers:
            raise TruedepthError(
                f"In the config of {where} {key} has {len(entries)} entries, but num_hidden_layers"
                f" is {layers}; give it one entry for each layer, in their order."
            )


def _check_rope(config: Mapping[str, Any], where: Path) -> None:
    given = {key: config.get(key) for key in (*ROPE, *ROPE_SETTINGS)}
    for key, value in _leaves(given):
        if isinstance(value, str) and _is_number(value):
            raise TruedepthError(
                f"The config of {where} gives {key} as the text {value!r}; it must be a number or"
                " true or false, written without quotation marks."
            )


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What a value of JSON holds, each with the keys that lead to it: `rope_scaling.factor`."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield from _leaves(inside, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inside in value:
            yield from _leaves(inside, key)
    else:
        yield key, value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.strip().lower() in ("true", "false")
    return True
