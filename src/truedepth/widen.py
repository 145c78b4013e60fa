"""A group of layers -> one wide layer, exactly.

Layer Parallelism (arXiv 2502.02790) runs the layers i of a group G on the same input:

    a = x + Σ_i A_i(N_i x)          attention
    y = a + Σ_i F_i(N'_i a)         FFN

`N_i x = x̂ ⊙ g_i` with `x̂ = x / rms(x)`, so the gain g_i folds into the maps that follow the norm:
`W_i N_i x = (W_i diag(g_i)) x̂`. The whole group is then one ordinary pre-norm layer:

    maps that read the residual stream    rows   [W_1 diag(g_1); W_2 diag(g_2); …], biases stacked
    maps that write to it                 columns [W_1, W_2, …],                    biases summed
    norms                                 gain 1

Heads, KV heads and FFN width are multiplied by the size of the group. Head dimension, RoPE and
query heads per KV head stay, and the heads of one layer stay next to each other, so grouped-query
attention keeps its mapping. Sharding the wide layer over n ranks puts whole layers on ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from truedepth.errors import TruedepthError
from truedepth.families import Family
from truedepth.tensors import (
    LazyTensor,
    add,
    common_dtype,
    join_columns,
    ones,
    remembered,
    scale_columns,
    stack_rows,
)

Layer = Mapping[str, LazyTensor]
"""The tensors of one layer by name within it, such as `mlp.up_proj.weight`."""


def widen(
    family: Family, group: Sequence[Layer], dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The wide layer that computes what the layers of `group` compute side by side.

    Args:
        family: Where the layers' norms and linear maps are.
        group: The layers, first to last; all of one shape.
        dtype: Of the result; by default every tensor keeps that of the tensors it is made from.
            Folding is done in float32 and rounded to this dtype once.

    Returns:
        The tensors of the wide layer, in the order norms, reading maps, writing maps.

    Raises:
        TruedepthError: A layer has a tensor that the family does not know, or lacks one.
    """
    _check(family, group)

    def each(name: str) -> list[LazyTensor]:
        return [layer[name] for layer in group]

    wide = {}
    gains = {norm: [remembered(gain) for gain in each(f"{norm}.weight")] for norm in family.norms}
    for norm, (gain, *_) in gains.items():
        wide[f"{norm}.weight"] = ones(gain.shape[0], gain.dtype)
    for name, norm in family.reads.items():
        weights = each(f"{name}.weight")
        folded = dtype or common_dtype(weights)
        pairs = zip(weights, gains[norm], strict=True)
        wide[f"{name}.weight"] = stack_rows([scale_columns(*pair, folded) for pair in pairs])
        if f"{name}.bias" in group[0]:
            wide[f"{name}.bias"] = stack_rows(each(f"{name}.bias"))
    for name in family.writes:
        wide[f"{name}.weight"] = join_columns(each(f"{name}.weight"))
        if f"{name}.bias" in group[0]:
            wide[f"{name}.bias"] = add(each(f"{name}.bias"))
    return {name: tensor.to(dtype or common_dtype(each(name))) for name, tensor in wide.items()}


def _check(family: Family, group: Sequence[Layer]) -> None:
    """Every tensor of every layer must have its place in the wide layer."""
    for layer in group:
        for name in sorted(set(layer) - family.layer_tensors):
            raise TruedepthError(
                f"A layer has the tensor {name!r}, which the family {family.model_type}"
                " does not know; widening would lose it."
            )
        for name in sorted(set(group[0]) ^ set(layer)):
            raise TruedepthError(f"Only some of the layers of a group have the tensor {name!r}.")
        for module in family.modules:
            if f"{module}.weight" not in layer:
                raise TruedepthError(f"A layer lacks the tensor '{module}.weight'.")
        for name, tensor in layer.items():
            if tensor.shape != group[0][name].shape:
                raise TruedepthError(
                    f"The layers of a group differ in the shape of {name!r}:"
                    f" {list(group[0][name].shape)} and {list(tensor.shape)}."
                )
