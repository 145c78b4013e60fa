"""Weights that are not numbers by themselves: quantized ones whose config.json does not say so.

transformers casts them and goes on, without the scales that belong to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from truedepth.errors import TruedepthError
from truedepth.tensors import LazyTensor

NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes of weights that mean what they hold."""

SCALES = {
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "scale_inv", "weight_zero_point"),
    *("weight_packed", "qweight", "qzeros", "SCB", "absmax", "quant_map", "weight_format"),
}
"""Last parts of the names of tensors that only quantized weights have."""


def check_dtypes(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], path: Path) -> None:
    """Refuse weights that are quantized though config.json does not say how.

    Args:
        tensors: By their names in transformers.
        config: The contents of config.json.
        path: The model's path, for messages.

    Raises:
        TruedepthError: A tensor is of float8 or complex numbers, a weight of whole numbers, or a
            tensor holds the scales of quantized weights.
    """
    if config.get("quantization_config"):  # the only key that transformers follows
        return
    for name, tensor in tensors.items():
        kind, last = str(tensor.dtype).removeprefix("torch."), name.rpartition(".")[2]
        if tensor.dtype.is_complex:
            raise TruedepthError(
                f"{path} holds {name!r} as {kind}; weights must be real numbers, such as float32."
            )
        number = tensor.dtype in NUMBERS
        # Whole numbers may also be masks and positions, which old checkpoints hold.
        if last in SCALES or not (number or (_is_whole(tensor.dtype) and last != "weight")):
            raise TruedepthError(
                f"{path} holds {name!r} ({kind}), which belongs to quantized weights, but its"
                " config.json has no quantization_config, so how they are scaled is not known; give"
                " the unquantized model, and quantize what is made from it."
            )


def _is_whole(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex
