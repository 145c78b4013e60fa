"""Rescales weights so that quantization loses less, while the model computes the same.

Quantizers give a few dozen neighbouring columns one shared scale, so a column that is much smaller
than its neighbours is lost in their rounding. A column's scale is therefore moved to a place where
it costs nothing:

    columns of                              their scale moves into
    maps that read the residual stream      the gain of the norm before them
    the FFN's down projection               the rows of the up projection

Every quantizer gives each row its own scales, and norms stay in float32. This also moves the gains
that widening folded into columns back into the norms.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from truedepth.families.family import Family
from truedepth.tensors import LazyTensor, from_tensor, scale_columns, scale_rows

BLOCK_BYTES = 1 << 22


def balanced(family: Family, layer: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Rescale a layer of any width so that its columns have equal norms.

    The layer computes the same function. Its weights are read once for the sizes, and again when
    the result is read.

    Args:
        family: The family, for the names of norms and maps.
        layer: The layer's tensors by their names within it, without `model.layers.3.`.

    Returns:
        All tensors of the layer by the same names; the rescaled ones are float32.
    """
    found = dict(layer)
    for norm in family.norms:
        reads = [f"{name}.weight" for name in family.reads_behind(norm)]
        sizes = _sizes(torch.stack([_column_squares(found[name]) for name in reads]).sum(0))
        for name in reads:
            found[name] = scale_columns(found[name], from_tensor(1 / sizes))
        found[f"{norm}.weight"] = scale_rows(found[f"{norm}.weight"], from_tensor(sizes))
    down, up = "mlp.down_proj.weight", "mlp.up_proj"
    sizes = _sizes(_column_squares(found[down]))
    found[down] = scale_columns(found[down], from_tensor(1 / sizes))
    for name in (f"{up}.weight", f"{up}.bias"):
        if name in found:
            found[name] = scale_rows(found[name], from_tensor(sizes))
    return found


def _column_squares(matrix: LazyTensor) -> Tensor:
    """The sum of squares of each column, `[columns]` float64."""
    blocks = matrix.blocks(BLOCK_BYTES)
    return torch.stack([block.double().square().sum(0) for block in blocks]).sum(0)


def _sizes(squares: Tensor) -> Tensor:
    """Column sizes, float32, with geometric mean 1; a column of zeros gets the smallest other."""
    if not squares.any():
        return torch.ones_like(squares, dtype=torch.float32)
    sizes = squares.clamp(min=squares[squares > 0].min()).sqrt().log()
    return (sizes - sizes.mean()).exp().float()
