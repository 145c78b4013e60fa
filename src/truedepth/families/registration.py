"""Makes transformers' auto classes know truedepth checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from truedepth.families.lookup import CONVERTED, all_families


@cache
def register() -> None:
    """Register every family's classes with AutoConfig, AutoModel and AutoModelForCausalLM.

    Those of families that are found by tracing are made when a checkpoint asks for them.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(CONFIG_MAPPING._extra_content, _MadeWhenAsked):
        CONFIG_MAPPING._extra_content = _MadeWhenAsked(CONFIG_MAPPING._extra_content)
    for family in all_families():
        _register(family.classes)


def _register(names: Sequence[str]) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from truedepth import modeling

    config, model, for_causal_lm = (getattr(modeling, f"{modeling.PREFIX}{n}") for n in names)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForCausalLM.register(config, for_causal_lm, exist_ok=True)


class _MadeWhenAsked(dict[str, Any]):
    """transformers' register of config classes by model type."""

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        if not isinstance(key, str) or not key.startswith(CONVERTED):
            return False
        names = _classes_of(key.removeprefix(CONVERTED))
        if not names:
            return False
        _register(names)
        return super().__contains__(key)


def _classes_of(model_type: str) -> list[str]:
    """Transformers' classes of a decoder: config, model, model with a head; [] if it has none."""
    from transformers.models.auto import configuration_auto, modeling_auto

    tables = (
        configuration_auto.CONFIG_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    found = [table.get(model_type) for table in tables]
    return [name for name in found if isinstance(name, str)] if all(found) else []
