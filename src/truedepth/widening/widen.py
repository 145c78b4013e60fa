"""A group of layers -> one wide layer, exactly.

Layer Parallelism (arXiv 2502.02790) runs the layers i of a group G on the same input:

    a = x + Σ_i A_i(N_i x)          attention
    y = a + Σ_i F_i(N'_i a)         FFN

`N_i x = x̂ ⊙ g_i` with `x̂ = x / rms(x)`, so the gain g_i folds into the maps that follow the norm:
`W_i N_i x = (W_i diag(g_i)) x̂`. The whole group is then one ordinary pre-norm layer:

    maps that read the residual stream    rows   [W_1 diag(g_1); W_2 diag(g_2); …], biases stacked
    maps that write to it                 columns [W_1, W_2, …],                    biases summed
    norms                                 gain 1

LayerNorm also has biases, `N_i x = x̂ ⊙ g_i + b_i`: `W_i b_i` is added to the biases of the maps,
and the wide norm's bias is 0. Maps that pack several (q, k and v in one) are taken apart, so that
the same part of all layers lies together. Norms over single heads keep each layer's gains.

Heads, KV heads and FFN width are multiplied by the size n of the group. Head dimension, RoPE and
query heads per KV head stay, and the heads of one layer stay next to each other, so grouped-query
attention keeps its mapping. Sharding the wide layer over n ranks gives each rank one whole layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.families.family import Family
from truedepth.tensors import (
    LazyTensor,
    add,
    common_dtype,
    constant,
    from_tensor,
    join_columns,
    remembered,
    scale_columns,
    stack_rows,
)

Layer = Mapping[str, LazyTensor]
"""The tensors of one layer by their names within it, such as `mlp.up_proj.weight`."""


def widen(
    family: Family,
    group: Sequence[Layer],
    dtype: torch.dtype | None = None,
    config: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, LazyTensor]:
    """The wide layer that computes what the layers of `group` compute side by side.

    Args:
        family: Names the layers' norms and linear maps.
        group: The layers, first to last, with tensors of the same shapes.
        dtype: Dtype of the result. By default every tensor keeps that of the tensors it is made
            from. Folding is done in float32 and rounded to this dtype once.
        config: The original's config, for the numbers of heads that families with packed maps or
            norms over single heads need.

    Returns:
        The tensors of the wide layer, in this order: norms, maps that read, norms over single
        heads, maps that write.

    Raises:
        TruedepthError: A layer has a tensor that the family does not know, or lacks one, or the
            layers differ in their tensors' shapes.
    """
    _check(family, group)
    gains = {f"{norm}.{part}" for norm in family.norms for part in ("weight", "bias")}
    group = [
        {name: remembered(tensor) if name in gains else tensor for name, tensor in layer.items()}
        for layer in group
    ]

    def each(name: str) -> list[LazyTensor]:
        return [layer[name] for layer in group]

    wide = {}
    for norm in family.norms:
        gain = group[0][f"{norm}.weight"]
        wide[f"{norm}.weight"] = constant(1 - family.gain_offset, gain.shape[0], gain.dtype)
        if f"{norm}.bias" in group[0]:
            wide[f"{norm}.bias"] = constant(0.0, gain.shape[0], gain.dtype)
    for name in family.reads:
        folded = dtype or common_dtype(each(f"{name}.weight"))
        weights = [_folded(family, layer, name, folded) for layer in group]
        sizes = packed_sizes(family, name, config, weights[0].shape[0])
        wide[f"{name}.weight"] = _stack(weights, sizes)
        if f"{name}.bias" in group[0]:
            wide[f"{name}.bias"] = _stack([_bias(family, layer, name) for layer in group], sizes)
    for name, heads in family.head_norms.items():
        if f"{name}.weight" in group[0]:
            wide[f"{name}.weight"] = stack_rows(
                [_of_each_head(gains, config[heads]) for gains in each(f"{name}.weight")]
            )
    for name in family.writes:
        wide[f"{name}.weight"] = join_columns(each(f"{name}.weight"))
        if f"{name}.bias" in group[0]:
            wide[f"{name}.bias"] = add(each(f"{name}.bias"))
    return {name: tensor.to(dtype or common_dtype(each(name))) for name, tensor in wide.items()}


def _folded(family: Family, layer: Layer, name: str, dtype: torch.dtype) -> LazyTensor:
    """`W diag(g)`; W where no norm comes before the map."""
    norm, weight = family.norm_before(name), layer[f"{name}.weight"]
    if norm is None:
        return weight
    return scale_columns(weight, layer[f"{norm}.weight"], dtype, family.gain_offset)


def _bias(family: Family, layer: Layer, name: str) -> LazyTensor:
    """The map's bias, plus `W b` where the norm before it has a bias b; float32 if summed."""
    bias, shift = layer[f"{name}.bias"], layer.get(f"{family.norm_before(name)}.bias")
    if shift is None:
        return bias
    weight = layer[f"{name}.weight"]

    def rows(start: int, stop: int) -> Tensor:
        return weight.rows(start, stop).float() @ shift.read().float() + bias.rows(start, stop)

    return LazyTensor(bias.shape, torch.float32, rows)


def packed_sizes(family: Family, name: str, config: Mapping[str, Any], rows: int) -> list[int]:
    """The number of rows of each map that the map `name`, of `rows` rows, packs."""
    counts = [config[key] for key in family.packed.get(name, ())] or [1]
    return [rows * count // sum(counts) for count in counts]


def _stack(layers: Sequence[LazyTensor], sizes: Sequence[int]) -> LazyTensor:
    """The rows of all layers one under another, for one packed map after another."""
    parts, start = [], 0
    for size in sizes:
        parts += [layer.row_range(start, start + size) for layer in layers]
        start += size
    return stack_rows(parts if len(sizes) > 1 else layers)


def _of_each_head(gains: LazyTensor, heads: int) -> LazyTensor:
    """`[heads, head_dim]`, from the same or from the `[head_dim]` that all heads share."""
    return gains if len(gains.shape) > 1 else from_tensor(gains.read().expand(heads, -1))


def _check(family: Family, group: Sequence[Layer]) -> None:
    """Raise TruedepthError unless every tensor of every layer has its place in the wide layer."""
    for layer in group:
        for name in sorted(set(layer) - family.layer_tensors):
            raise TruedepthError(
                f"A layer has the tensor {name!r}, which the family {family.model_type}"
                " does not know; widening would lose it."
            )
        for name in sorted(set(group[0]) ^ set(layer)):
            raise TruedepthError(f"Only some of the layers of a group have the tensor {name!r}.")
        for module in (*family.norms, *family.reads, *family.writes):
            if f"{module}.weight" not in layer:
                raise TruedepthError(f"A layer lacks the tensor '{module}.weight'.")
        for name in family.reads:
            if f"{family.norm_before(name)}.bias" in layer and f"{name}.bias" not in layer:
                raise TruedepthError(
                    f"A layer has a norm with a bias before {name}, which has no bias to absorb it."
                )
        for name, tensor in layer.items():
            if tensor.shape != group[0][name].shape:
                raise TruedepthError(
                    f"The layers of a group differ in the shape of {name!r}:"
                    f" {list(group[0][name].shape)} and {list(tensor.shape)}."
                )
