"""Finds the family of a config.json, or says why the model is not supported."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

from truedepth import families
from truedepth.errors import TruedepthError
from truedepth.families.family import Family


@cache
def all_families() -> tuple[Family, ...]:
    """Every supported family: all that this folder's files list as `FAMILIES`."""
    found = pkgutil.iter_modules(families.__path__)
    files = sorted(module.name for module in found if not module.ispkg)
    modules = [import_module(f"{families.__name__}.{file}") for file in files]
    return tuple(family for module in modules for family in getattr(module, "FAMILIES", ()))


CONVERTED = "truedepth_"
"""A layer-parallel checkpoint's `model_type` is this, then the original's."""


OURS = ("layer_widths", "stages", "side_by_side", "sublayers", "truedepth")
"""What a converted config.json has in addition to the original's."""


def unconverted(model_type: str) -> str:
    """The original's `model_type`: `llama` for `truedepth_llama`."""
    return model_type.removeprefix(CONVERTED)


def known_family(config: Mapping[str, Any]) -> Family | None:
    """The family of an original's config.json; None if it is not supported."""
    try:
        return described_family(config) or traced(config)
    except TruedepthError:
        return None


def described_family(config: Mapping[str, Any]) -> Family | None:
    """The family that a file of this folder describes; None if none does."""
    return {family.model_type: family for family in all_families()}.get(
        str(config.get("model_type"))
    )


def traced(config: Mapping[str, Any]) -> Family:
    """The family by a small model of its kind, run once.

    Raises:
        TruedepthError: See `tracing.trace.traced_family`.
    """
    from truedepth.families.tracing.trace import traced_family  # it imports torch

    return traced_family({key: value for key, value in config.items() if key not in OURS})


def known_original_family(config: Mapping[str, Any]) -> Family | None:
    """`known_family` of a model, or of the original of a layer-parallel checkpoint."""
    return known_family({**config, "model_type": unconverted(str(config.get("model_type")))})


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of an original's config.json; `where` names the model in errors.

    Raises:
        TruedepthError: The family is unknown, or the checkpoint is converted already.
    """
    model_type = str(config.get("model_type"))
    if model_type.startswith(CONVERTED):
        raise TruedepthError(
            f"{where} is already layer-parallel; convert the model that it was made from instead."
        )
    family = described_family(config)
    if family is None:
        try:
            family = traced(config)
        except TruedepthError as error:
            raise TruedepthError(
                f"{where} is of the family {model_type!r}, which is not supported: {error}."
            ) from error
    return family


def quantization_of(config: Mapping[str, Any]) -> str:
    """The method by which a checkpoint's weights are quantized, by its config.json; "" if none."""
    quantization = config.get("quantization_config")
    if not quantization:
        return ""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(method or "of an unknown method")


def original_family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a model, or of the original of a layer-parallel checkpoint.

    Raises:
        TruedepthError: See `family_of`.
    """
    return family_of({**config, "model_type": unconverted(str(config.get("model_type")))}, where)
