"""Makes transformers' auto classes know truedepth checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from truedepth.families.lookup import CONVERTED, all_families


@cache
def register() -> None:
    """Register every family's classes with transformers' auto classes.

    Those of families that are found by tracing, and of models that take other input too, are made
    when a checkpoint asks for them.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from truedepth import modeling

    if not isinstance(CONFIG_MAPPING._extra_content, _MadeWhenAsked):
        CONFIG_MAPPING._extra_content = _MadeWhenAsked(CONFIG_MAPPING._extra_content)
    for family in all_families():
        _register(modeling.auto_classes(family.model_type))


def register_type(model_type: str) -> None:
    """Register the classes of one type of checkpoint, such as `truedepth_seed_oss`.

    A config that another process made does not ask for them.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    register()
    model_type in CONFIG_MAPPING  # noqa: B015  asks


def _register(names: Mapping[str, str]) -> None:
    """Register our classes for those of transformers', by their auto classes."""
    import transformers

    from truedepth import modeling

    ours = {auto: getattr(modeling, f"{modeling.PREFIX}{name}") for auto, name in names.items()}
    config = ours.pop("AutoConfig")
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, model in ours.items():
        getattr(transformers, auto).register(config, model, exist_ok=True)


class _MadeWhenAsked(dict[str, Any]):
    """transformers' register of config classes by model type."""

    def __contains__(self, key: object) -> bool:
        if super().__contains__(key):
            return True
        if not isinstance(key, str) or not key.startswith(CONVERTED):
            return False
        from truedepth import modeling

        names = modeling.auto_classes(key.removeprefix(CONVERTED))
        if "AutoConfig" not in names or len(names) < 2:
            return False
        _register(names)
        return super().__contains__(key)
