"""truedepth: a pretrained LLM, shallower and wider, without retraining.

    import truedepth as td

    plan = td.search("default", max_loss=0.05).plan     # the shallowest within 0.05 nats per token
    td.calibrate("default", "smollm2-lp", plan)
    print(td.perplexity("smollm2-lp", against="default"))

Importing truedepth makes `transformers.AutoModelForCausalLM` load its checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from truedepth.errors import TruedepthError
from truedepth.families.registration import register
from truedepth.plan.plan import Plan
from truedepth.version import __version__, keep_old_names

if TYPE_CHECKING:
    from truedepth.calibration.options import Calibration
    from truedepth.conversion import calibrate, convert
    from truedepth.depth_study.run import study
    from truedepth.engines.gguf.export import export
    from truedepth.evaluation.accuracy import task_scores
    from truedepth.evaluation.generation import generation
    from truedepth.evaluation.perplexity import perplexity
    from truedepth.evaluation.probes import probe
    from truedepth.healing.options import Healing
    from truedepth.healing.run import heal
    from truedepth.planning.options import Merges
    from truedepth.planning.search import search
    from truedepth.runtime.fusing import fuse
    from truedepth.runtime.loading import load
    from truedepth.sources.opening import open_source
    from truedepth.speed.benchmark import bench
    from truedepth.speed.prediction import predict, seconds_of_plans

__all__ = [
    "Calibration",
    "Healing",
    "Merges",
    "Plan",
    "TruedepthError",
    "__version__",
    "bench",
    "calibrate",
    "convert",
    "export",
    "fuse",
    "generation",
    "heal",
    "load",
    "open_source",
    "perplexity",
    "predict",
    "probe",
    "search",
    "seconds_of_plans",
    "study",
    "task_scores",
]

# Loaded on first use: they import torch, which takes a second. No submodule has the name of one of
# these functions: once imported, it would hide the function.
_LAZY = {
    "Calibration": "truedepth.calibration.options",
    "Healing": "truedepth.healing.options",
    "Merges": "truedepth.planning.options",
    "bench": "truedepth.speed.benchmark",
    "calibrate": "truedepth.conversion",
    "convert": "truedepth.conversion",
    "export": "truedepth.engines.gguf.export",
    "fuse": "truedepth.runtime.fusing",
    "generation": "truedepth.evaluation.generation",
    "heal": "truedepth.healing.run",
    "load": "truedepth.runtime.loading",
    "open_source": "truedepth.sources.opening",
    "perplexity": "truedepth.evaluation.perplexity",
    "predict": "truedepth.speed.prediction",
    "probe": "truedepth.evaluation.probes",
    "search": "truedepth.planning.search",
    "seconds_of_plans": "truedepth.speed.prediction",
    "study": "truedepth.depth_study.run",
    "task_scores": "truedepth.evaluation.accuracy",
}


keep_old_names()


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'truedepth' has no attribute {name!r}")
    from importlib import import_module

    globals()[name] = value = getattr(import_module(_LAZY[name]), name)
    return value


# Registering imports transformers' models, which takes seconds. The command line (argv[0] is "-m"
# while `python -m truedepth` imports this) registers when it loads a model instead, so that help
# and error messages come at once.
if Path(sys.argv[0] if sys.argv else "").name not in ("truedepth", "-m"):
    register()
