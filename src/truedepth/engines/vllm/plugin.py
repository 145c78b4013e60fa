"""The vLLM plugin: vLLM runs truedepth checkpoints with its own kernels.

Through the entry point `vllm.general_plugins`, vLLM calls `register` in each of its processes.
"""

from __future__ import annotations

from truedepth.engines.support import VLLM_FAMILIES
from truedepth.families.lookup import all_families
from truedepth.modeling import PREFIX

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
