"""Adds heads of zeros, so that head counts become divisible by a number of ranks.

A head with zero query, key, value and output weights adds nothing to the output. KV heads are
padded to the next multiple of the ranks, and each new one gets as many query heads as the others
have. Originals are padded before they are widened, so the new heads come after those of every
original layer, and a wide layer sharded over as many ranks as it holds layers still puts one whole
layer on each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.families.family import KEY_VALUE, QUERY, head_dim
from truedepth.families.lookup import original_family
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor, stack_rows, zeros


def head_padding(config: Mapping[str, Any], ranks: int) -> dict[str, int]:
    """The config values that make a model's head counts divisible by a number of ranks.

    Args:
        config: The model's config.json.
        ranks: At least 1.

    Returns:
        `num_attention_heads`, `num_key_value_heads` and `head_dim`; empty if they are divisible
        already.

    Raises:
        TruedepthError: The FFN's width is not divisible by the ranks, the config lacks a count, or
            heads of this family cannot be padded.
    """
    if ranks < 1:
        raise TruedepthError(f"Heads are padded for at least 1 rank, not {ranks}.")
    if ranks == 1:
        return {}
    if missing := {QUERY, "intermediate_size"} - config.keys():
        raise TruedepthError(
            f"The config lacks {min(missing)}, which must be divisible by {ranks} ranks."
        )
    if (width := config["intermediate_size"]) % ranks:
        raise TruedepthError(f"The FFN's width {width} is not divisible by {ranks} ranks.")
    query = config[QUERY]
    key_value = config.get(KEY_VALUE) or query
    if key_value % ranks == 0:
        return {}
    family = original_family(config, "The model")
    if not family.heads:
        raise TruedepthError(
            f"{query} heads and {key_value} KV heads are not divisible by {ranks} ranks, and heads"
            f" of the family {family.model_type} cannot be padded."
        )
    padded = -(-key_value // ranks) * ranks
    return {
        QUERY: padded * (query // key_value),
        KEY_VALUE: padded,
        "head_dim": head_dim(config),
    }


def check_heads(source: Source, ranks: int) -> None:
    """Refuse a model whose heads or FFN width are not divisible by a number of ranks.

    Raises:
        TruedepthError: They are not.
    """
    if ranks > 1 and head_padding(source.config, ranks):
        heads, kv_heads = (source.config.get(name) for name in (QUERY, KEY_VALUE))
        raise TruedepthError(
            f"{source.path} has {heads} heads and {kv_heads or heads} KV heads, which are not"
            f" divisible by {ranks} ranks; convert it with truedepth convert --pad-heads {ranks}"
            " (and --pairs 0 to pair no layers)."
        )


def check_local(source: Source, ranks: int | None) -> None:
    """Refuse stages that are local to a number of ranks which do not divide the heads.

    Raises:
        TruedepthError: They do not, or the FFN's width is not divisible.
    """
    if ranks is not None and head_padding(source.config, ranks):
        heads, kv_heads = (source.config.get(name) for name in (QUERY, KEY_VALUE))
        raise TruedepthError(
            f"Stages cannot be local to {ranks} ranks: {source.path} has {heads} heads and"
            f" {kv_heads or heads} KV heads, which are not divisible by {ranks}; truedepth convert"
            f" --pad-heads {ranks} adds heads of zeros, and so does truedepth plan."
        )


def padded(source: Source, ranks: int) -> Source:
    """An original whose head counts are divisible by a number of ranks; itself if they are.

    Raises:
        TruedepthError: As `head_padding`, or its weights are quantized.
    """
    padding = head_padding(source.config, ranks)
    if not padding:
        return source
    source.check_plain("to which no heads can be added")
    tensors = partial(_padded_tensors, source, padding)
    return replace(source, config={**source.config, **padding}, read_tensors=tensors)


def _padded_tensors(source: Source, padding: Mapping[str, int]) -> dict[str, LazyTensor]:
    family = source.family

    def padded(name: str, tensor: LazyTensor) -> LazyTensor:
        layer, rest = family.split(name)
        module, _, kind = rest.rpartition(".")
        if layer is not None and module in family.head_norms and len(tensor.shape) > 1:
            return _pad_rows(tensor, padding[family.head_norms[module]])
        if layer is None or module not in family.heads:
            return tensor
        size = padding[family.heads[module]] * padding["head_dim"]
        if module not in family.writes:
            return _pad_rows(tensor, size)
        return _pad_columns(tensor, size) if kind == "weight" else tensor

    return {name: padded(name, tensor) for name, tensor in source.tensors.items()}


def _pad_rows(tensor: LazyTensor, size: int) -> LazyTensor:
    """With rows of zeros at its end, to `size` rows."""
    return stack_rows([tensor, zeros((size - tensor.shape[0], *tensor.shape[1:]), tensor.dtype)])


def _pad_columns(tensor: LazyTensor, size: int) -> LazyTensor:
    """With columns of zeros at its end, to `size` columns."""

    def rows(start: int, stop: int) -> Tensor:
        return torch.nn.functional.pad(tensor.rows(start, stop), (0, size - tensor.shape[1]))

    return LazyTensor((tensor.shape[0], size), tensor.dtype, rows)
