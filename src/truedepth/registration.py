"""Makes transformers' auto classes know truedepth checkpoints."""

from __future__ import annotations

from truedepth.families import all_families


def register() -> None:
    """Register every family's classes with AutoConfig, AutoModel and AutoModelForCausalLM."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from truedepth import modeling

    for family in all_families():
        prefix = f"{modeling.PREFIX}{family.class_prefix}"
        config = getattr(modeling, f"{prefix}Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(modeling, f"{prefix}Model"), exist_ok=True)
        for_causal_lm = getattr(modeling, f"{prefix}ForCausalLM")
        AutoModelForCausalLM.register(config, for_causal_lm, exist_ok=True)
