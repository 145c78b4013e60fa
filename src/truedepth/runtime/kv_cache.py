"""The KV cache that a model of transformers takes."""

from __future__ import annotations

from inspect import signature

from torch import nn
from transformers import Cache


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """A KV cache as an argument of `forward`: `past_key_values`, or `cache` in newer releases.

    Args:
        model: A model of transformers, not compiled.
        cache: What `forward` is to read and extend.

    Returns:
        Arguments for the model's `forward`.
    """
    named = signature(type(model).forward).parameters
    return {"cache" if "cache" in named else "past_key_values": cache}
