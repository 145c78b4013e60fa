"""vLLM runs truedepth checkpoints on its own kernels.

The entry point `vllm.general_plugins` has vLLM call `register` in each of its processes.
"""

from __future__ import annotations

from truedepth.families import all_families
from truedepth.modeling import PREFIX

MODELS = "truedepth.engines.vllm_models"


def register() -> None:
    """Tell vLLM which class runs which checkpoint. Imports none of them."""
    from vllm import ModelRegistry

    for family in all_families():
        name = f"{PREFIX}{family.class_prefix}ForCausalLM"
        ModelRegistry.register_model(name, f"{MODELS}:{name}")
