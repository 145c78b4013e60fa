"""Adds heads of zeros, so that head counts become divisible by a number of ranks.

A head with zero query, key, value and output weights adds nothing to the output. KV heads are
padded to the next multiple of the ranks, and each new one gets as many query heads as the others
have. Padding comes after the heads of every original layer, so that a wide layer sharded over as
many ranks as it holds layers still puts one whole layer on each rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.families.family import KEY_VALUE, QUERY, Family, head_dim
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


def padded_tensors(
    family: Family,
    tensors: Mapping[str, LazyTensor],
    widths: list[int],
    padding: Mapping[str, int],
) -> dict[str, LazyTensor]:
    """The tensors of the padded model.

    Args:
        family: Says which maps have heads.
        tensors: The tensors of a converted model by name.
        widths: The number of original layers in each of its layers.
        padding: What `head_padding` returns for the original.
    """

    def padded(name: str, tensor: LazyTensor) -> LazyTensor:
        layer, rest = family.split(name)
        module, _, kind = rest.rpartition(".")
        if layer is not None and module in family.head_norms and len(tensor.shape) > 1:
            return _pad_rows(tensor, widths[layer], padding[family.head_norms[module]])
        if layer is None or module not in family.heads:
            return tensor
        size = padding[family.heads[module]] * padding["head_dim"]
        if module not in family.writes:
            return _pad_rows(tensor, widths[layer], size)
        return _pad_columns(tensor, widths[layer], size) if kind == "weight" else tensor

    return {name: padded(name, tensor) for name, tensor in tensors.items()}


def _pad_rows(tensor: LazyTensor, parts: int, size: int) -> LazyTensor:
    """Pad each of `parts` equal parts with rows of zeros at its end, to `size` rows."""
    before = tensor.shape[0] // parts
    pad = zeros((size - before, *tensor.shape[1:]), tensor.dtype)
    pieces = []
    for part in range(parts):
        pieces += [tensor.row_range(part * before, (part + 1) * before), pad]
    return stack_rows(pieces)


def _pad_columns(tensor: LazyTensor, parts: int, size: int) -> LazyTensor:
    """Pad each of `parts` equal parts with columns of zeros at its end, to `size` columns."""
    before = tensor.shape[1] // parts

    def rows(start: int, stop: int) -> Tensor:
        split = tensor.rows(start, stop).reshape(stop - start, parts, before)
        return torch.nn.functional.pad(split, (0, size - before)).flatten(1)

    return LazyTensor((tensor.shape[0], parts * size), tensor.dtype, rows)
