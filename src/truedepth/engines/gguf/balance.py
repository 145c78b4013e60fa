"""Weights rescaled so that a quantizer loses less, and the model stays what it is.

Quantizers give some tens of neighbouring columns one scale, so a column that is much smaller than
its neighbours drowns in their rounding. Where a column's scale can be moved elsewhere at no cost it
is moved:

    of maps that read the residual stream    into the gain of the norm before them
    of the FFN's down projection             into the rows of the up projection

Rows keep scales of their own in every quantizer, and norms stay in float32. Folded gains, which
widening puts into the columns, go back where they came from this way, and more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from truedepth.families.family import Family
from truedepth.tensors import LazyTensor, from_tensor, scale_columns, scale_rows

BLOCK_BYTES = 1 << 22


def balanced(family: Family, layer: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A layer of any width that computes the same, with columns of equal size, in float32.

    Its weights are read once now, and again when the result is.

    Args:
        family: Its names.
        layer: By names within it; `model.layers.3.` is not part of them.
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
    """`[columns]` float64: each column's sum of squares."""
    blocks = matrix.blocks(BLOCK_BYTES)
    return torch.stack([block.double().square().sum(0) for block in blocks]).sum(0)


def _sizes(squares: Tensor) -> Tensor:
    """float32, 1 in the geometric mean; columns of zeros count as the smallest other."""
    if not squares.any():
        return torch.ones_like(squares, dtype=torch.float32)
    sizes = squares.clamp(min=squares[squares > 0].min()).sqrt().log()
    return (sizes - sizes.mean()).exp().float()
