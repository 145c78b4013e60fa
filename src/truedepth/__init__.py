"""truedepth: a pretrained LLM, shallower and wider, without retraining.

    import truedepth as td

    plan = td.search("default", max_loss=0.05).plan     # the shallowest within 0.05 nats a token
    td.calibrate("default", "smollm2-lp", plan)
    print(td.perplexity("smollm2-lp", against="default"))

Importing truedepth makes `transformers.AutoModelForCausalLM` load its checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from truedepth.errors import TruedepthError
from truedepth.plan import Plan
from truedepth.registration import register

if TYPE_CHECKING:
    from truedepth.accuracy import task_scores
    from truedepth.benchmark import bench
    from truedepth.calibration_text import Calibration
    from truedepth.conversion import calibrate, convert
    from truedepth.depth_study import study
    from truedepth.engines.gguf import export
    from truedepth.evaluate import perplexity
    from truedepth.heal_options import Healing
    from truedepth.healing import heal
    from truedepth.loading import load
    from truedepth.plan_search import search
    from truedepth.prediction import predict
    from truedepth.sources import open_source

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Healing",
    "Plan",
    "TruedepthError",
    "bench",
    "calibrate",
    "convert",
    "export",
    "heal",
    "load",
    "open_source",
    "perplexity",
    "predict",
    "search",
    "study",
    "task_scores",
]

# Loaded when first used: they import torch, which takes a second. No module bears the name of one
# of these functions, for a submodule once imported would take the name over.
_LAZY = {
    "Calibration": "truedepth.calibration_text",
    "Healing": "truedepth.heal_options",
    "bench": "truedepth.benchmark",
    "calibrate": "truedepth.conversion",
    "convert": "truedepth.conversion",
    "export": "truedepth.engines.gguf",
    "heal": "truedepth.healing",
    "load": "truedepth.loading",
    "open_source": "truedepth.sources",
    "perplexity": "truedepth.evaluate",
    "predict": "truedepth.prediction",
    "search": "truedepth.plan_search",
    "study": "truedepth.depth_study",
    "task_scores": "truedepth.accuracy",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'truedepth' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(_LAZY[name]), name)
    return value


# Takes seconds, for transformers' models are imported. The command line (argv[0] is "-m" while
# `python -m truedepth` imports this) registers when it loads a model instead, so that help and
# error messages come at once.
if Path(sys.argv[0] if sys.argv else "").name not in ("truedepth", "-m"):
    register()
