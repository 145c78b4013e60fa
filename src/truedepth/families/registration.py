"""Makes transformers' auto classes know truedepth checkpoints."""

from __future__ import annotations

from functools import cache

from truedepth.families.lookup import all_families


@cache
def register() -> None:
    """Register every family's classes with AutoConfig, AutoModel and AutoModelForCausalLM."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from truedepth import modeling

    for family in all_families():
        config, model, for_causal_lm = (
            getattr(modeling, f"{modeling.PREFIX}{name}") for name in family.classes
        )
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, for_causal_lm, exist_ok=True)
