"""A calibration from text to weights on disk, layer by layer, gone on with after a kill."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from truedepth.calibration.options import Calibration
from truedepth.calibration.refit import Calibrator, Refit
from truedepth.calibration.trajectories import walk_of
from truedepth.calibration.windows import activation_dtype, calibration_windows, placement
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import Loss
from truedepth.files.atomic import whole_file
from truedepth.files.resumable import unfinished
from truedepth.plan.plan import Plan
from truedepth.progress import progress_bar
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor, dtype_name, from_tensor
from truedepth.text import DEFAULT_TEXT
from truedepth.widening.layout import places_of_groups

METHOD = 1  # raised when the same settings give other weights than before


@dataclass(frozen=True)
class Calibrated:
    """The refitted layers of a conversion."""

    tensors: dict[str, LazyTensor]
    """By name in the converted model, float32; mapped from files that must stay."""

    record: dict[str, Any]
    """For config.json: what it was calibrated on, and what each map gained on held-out windows."""


@contextmanager
def calibrated(
    source: Source, plan: Plan, directory: Path, options: Calibration
) -> Iterator[Calibrated]:
    """Refit the wide layers of a conversion, which can be read until the block ends.

    Args:
        source: The original.
        plan: Of the conversion.
        directory: Keeps every layer as it is refitted, until the block has ended without an
            exception. A run that finds the layers of the same calibration there goes on after them;
            those of another are removed.
        options: What to calibrate on.

    Raises:
        TruedepthError: Text or options do not fit, or another run is at work in the directory.
    """
    places = places_of_groups(source, plan.groups)
    if not any(len(place) < len(group) for place, group in zip(places, plan.groups, strict=True)):
        raise TruedepthError(
            f"All groups of the plan are branch groups of {source.config['model_type']}, whose"
            " layers stay as they are; convert it with --no-calibrate."
        )
    text = calibration_windows(source, options, max(plan.widths))
    _, dtype = placement(source, options)
    settings = {
        "text": [Path(path).name for path in options.text] or [DEFAULT_TEXT],
        "tokens": text.fitted.numel(),
        "own_text": options.own_share,
        "window": options.window,
        "seed": options.seed,
        "dtype": dtype_name(dtype),
        "activation_dtype": dtype_name(activation_dtype(options)),
    }
    identity = {
        **settings,
        "method": METHOD,
        "model fingerprint": source.fingerprint,
        "text fingerprint": hashlib.sha256(text.fitted.numpy().tobytes()).hexdigest(),
        "plan": plan.to_dict(),
        "batch_size": options.batch_size,
    }
    with unfinished(directory, identity, begin_again=True) as kept:
        walk = walk_of(source, plan.groups, text.fitted, text.check, options)
        calibrator = Calibrator(source.family, walk)
        gains: dict[str, Any] = {}
        replaced: dict[str, LazyTensor] = {}
        with progress_bar("Calibrating layers", len(plan.groups)) as advance:
            for index, group in enumerate(plan.groups):
                path = kept / f"layer-{index:04d}.safetensors"
                wide = len(group) > 1 and walk.converted.is_wide(index)
                if not wide:
                    walk.advance(index, group)
                elif path.exists():
                    walk.advance(index, group, load_file(path))
                else:
                    refit = calibrator.refit(index, group)
                    source.check_unchanged()
                    _save(refit, path)
                if wide:
                    weights, gains["+".join(map(str, group))] = _read(path)
                    prefix = source.family.layer.format(*walk.converted.places[index])
                    replaced |= {prefix + name: tensor for name, tensor in weights.items()}
                advance(1)
        check = Loss.of(walk.losses()[0], options.window) if len(text.check) else None
        del walk, calibrator  # their states are not needed for writing
        record = settings | {
            "check": asdict(check) if check else None,
            "held_out_errors": gains,
        }
        yield Calibrated(replaced, record)


def _save(refit: Refit, path: Path) -> None:
    """All at once: a file of that name is whole."""
    fits = {name: (fit.penalty, fit.before, fit.after) for name, fit in refit.fits.items()}
    weights = {name: weight.cpu().contiguous() for name, weight in refit.weights.items()}
    with whole_file(path) as partial:
        save_file(weights, partial, metadata={"fits": json.dumps(fits)})


def _read(path: Path) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Weights, and for every map λ and the held-out errors before and after."""
    with safe_open(path, "pt") as file:
        fits = json.loads(file.metadata()["fits"])
    gains = {
        name: {
            "penalty": None if math.isinf(penalty) else penalty,
            "before": round(before, 6),
            "after": round(after, 6),
        }
        for name, (penalty, before, after) in fits.items()
    }
    return {name: from_tensor(tensor) for name, tensor in load_file(path).items()}, gains
