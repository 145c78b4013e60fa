"""vLLM runs truedepth checkpoints on its own kernels.

The entry point `vllm.general_plugins` has vLLM call `register` in each of its processes.
"""

from __future__ import annotations

import os

from truedepth.engines.support import VLLM_FAMILIES
from truedepth.errors import TruedepthError
from truedepth.families.lookup import all_families
from truedepth.modeling import PREFIX

TESTED = ("0.32",)
"""Versions of vLLM, by their first two numbers; model classes change between such versions."""

ANY_VERSION = "TRUEDEPTH_ANY_VLLM"

MODELS = "truedepth.engines.vllm.models"


def register() -> None:
    """Tell vLLM which class runs which checkpoint. Imports none of them."""
    from vllm import ModelRegistry

    for family in all_families():
        if family.model_type not in VLLM_FAMILIES:
            continue
        name = f"{PREFIX}{family.class_prefix}ForCausalLM"
        ModelRegistry.register_model(name, f"{MODELS}:{name}")


def check_version(version: str) -> None:
    """Refuse versions that were not tested, when a checkpoint of ours is loaded and not before.

    Raises:
        TruedepthError: This is one, and the environment variable TRUEDEPTH_ANY_VLLM is not set.
    """
    if ".".join(version.split(".")[:2]) not in TESTED and not os.environ.get(ANY_VERSION):
        raise TruedepthError(
            f"This is vLLM {version}; truedepth was tested with {', '.join(TESTED)}. Install one of"
            f" these, or set {ANY_VERSION}=1 to try this one."
        )
