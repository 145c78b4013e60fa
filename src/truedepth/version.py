"""The package's version, here and nowhere else, and its modules' names in earlier versions.

Modules of version 0.1.0 that scripts import lie in folders now. An old name gives the module of
today, with a DeprecationWarning.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

MOVED = {
    "truedepth.accuracy": "truedepth.evaluation.accuracy",
    "truedepth.benchmark": "truedepth.speed.benchmark",
    "truedepth.evaluate": "truedepth.evaluation.perplexity",
    "truedepth.generation": "truedepth.runtime.generation",
    "truedepth.heal_options": "truedepth.healing.options",
    "truedepth.loading": "truedepth.runtime.loading",
    "truedepth.plan_search": "truedepth.planning.search",
    "truedepth.prediction": "truedepth.speed.prediction",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=2)
        sys.modules[old] = import_module(new)  # the import takes what stands here afterwards


def keep_old_names() -> None:
    """Let `import` find modules under the names that they had in version 0.1.0."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
