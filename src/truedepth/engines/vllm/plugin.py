"""The vLLM plugin: vLLM runs truedepth checkpoints with its own kernels.

Through the entry point `vllm.general_plugins`, vLLM calls `register` in each of its processes.
"""

from __future__ import annotations

import os

from truedepth.engines.support import VLLM_FAMILIES
from truedepth.errors import TruedepthError
from truedepth.families.lookup import all_families
from truedepth.modeling import PREFIX

TESTED = ("0.32",)
"""Tested versions of vLLM (major.minor); its model classes change between minor versions."""

ANY_VERSION = "TRUEDEPTH_ANY_VLLM"
"""Environment variable that allows versions that were not tested."""

MODELS = "truedepth.engines.vllm.models"


def register() -> None:
    """Tell vLLM which class runs which checkpoint, without importing the classes."""
    from vllm import ModelRegistry

    described = {family.model_type: family for family in all_families()}
    names = {described[each].classes[-1] for each in VLLM_FAMILIES}
    for name in names | _decoders():
        ModelRegistry.register_model(f"{PREFIX}{name}", f"{MODELS}:{PREFIX}{name}")


def _decoders() -> set[str]:
    """Transformers' classes of decoders. What vLLM does not know is refused when it is loaded."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)}


def check_version(version: str) -> None:
    """Refuse versions that were not tested. Called only when a truedepth checkpoint is loaded.

    Raises:
        TruedepthError: The version was not tested, and TRUEDEPTH_ANY_VLLM is not set.
    """
    if ".".join(version.split(".")[:2]) not in TESTED and not os.environ.get(ANY_VERSION):
        raise TruedepthError(
            f"This is vLLM {version}, but truedepth was tested with {', '.join(TESTED)}; install a"
            f" tested version, or set {ANY_VERSION}=1 to try this one."
        )
