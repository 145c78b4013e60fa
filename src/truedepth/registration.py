"""Makes transformers' auto classes know truedepth checkpoints, without importing transformers.

Importing transformers' models takes seconds, for which `truedepth --help` should not wait. So
config classes are registered when transformers loads the module that holds their registry (or now,
where that has happened), and model classes, which need the families' own models, when the first
config is made: nothing can be loaded before that.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

from truedepth.families import all_families

_REGISTRY = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register every family's classes with AutoConfig, AutoModel and AutoModelForCausalLM."""
    if _REGISTRY in sys.modules:
        _register_configs()
    elif not any(isinstance(finder, _AfterRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterRegistry())


def _register_configs() -> None:
    from transformers import AutoConfig

    from truedepth import modeling

    for family in all_families():
        config = getattr(modeling, f"{modeling.PREFIX}{family.class_prefix}Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
    modeling.on_first_config.append(_register_models)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from truedepth import modeling

    for family in all_families():
        prefix = f"{modeling.PREFIX}{family.class_prefix}"
        config = getattr(modeling, f"{prefix}Config")
        AutoModel.register(config, getattr(modeling, f"{prefix}Model"), exist_ok=True)
        for_causal_lm = getattr(modeling, f"{prefix}ForCausalLM")
        AutoModelForCausalLM.register(config, for_causal_lm, exist_ok=True)


class _AfterRegistry(importlib.abc.MetaPathFinder):
    """Registers the configs right after their registry has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register_configs()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
