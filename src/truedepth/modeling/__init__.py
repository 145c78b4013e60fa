"""The model classes of converted checkpoints; its other files are copied into every checkpoint.

These import only torch, transformers and one another, by relative imports, so that checkpoints load
with `trust_remote_code=True` where truedepth is missing.

May import: nothing of truedepth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from truedepth.modeling import modeling
from truedepth.modeling.forms import KINDS, LayerForm, run_sublayer
from truedepth.modeling.modeling import PREFIX, auto_classes, auto_map, styles_of, text_config
from truedepth.modeling.parts import GATHERED, SimulatedRanks, give_parts
from truedepth.modeling.wide_layers import WIDENED, wide_layer

FILES = tuple(sorted(set(Path(__file__).parent.glob("*.py")) - {Path(__file__)}))
"""What is copied."""

__all__ = [
    "FILES",
    "GATHERED",
    "KINDS",
    "PREFIX",
    "WIDENED",
    "LayerForm",
    "SimulatedRanks",
    "auto_classes",
    "auto_map",
    "give_parts",
    "run_sublayer",
    "styles_of",
    "text_config",
    "wide_layer",
]


def __getattr__(name: str) -> Any:
    """`Truedepth<Family>Config`, `…Model`, `…ForCausalLM` and others."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(modeling, name)
