"""A calibration, from text to weights on disk, segment by segment; a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from truedepth.calibration.options import Calibration
from truedepth.calibration.refit import Calibrator, Refit
from truedepth.calibration.trajectories import layer_stack, walk_through
from truedepth.calibration.windows import activation_dtype, calibration_windows, placement
from truedepth.checkpoint.records import CalibrationRecord, MapError
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import loss_of
from truedepth.files.atomic import whole_file
from truedepth.files.resumable import unfinished
from truedepth.plan.stages import Segment, group_of
from truedepth.progress import progress_bar
from truedepth.tensors import LazyTensor, dtype_name, from_tensor
from truedepth.text import DEFAULT_TEXT
from truedepth.widening.layout import Layout

METHOD = 1  # raised when the same settings give other weights than before


@dataclass(frozen=True)
class Calibrated:
    """The refitted segments of a conversion."""

    tensors: dict[str, LazyTensor]
    """By name in the converted model, float32; memory maps of files that must stay."""

    record: CalibrationRecord


@contextmanager
def calibrated(layout: Layout, directory: Path, options: Calibration) -> Iterator[Calibrated]:
    """Refit the merged segments of a conversion, which can be read until the block ends.

    Args:
        layout: The conversion's layout.
        directory: Where every refitted segment is kept until the block ends without an exception.
            A run that finds some of the same calibration there resumes after them; those of
            another calibration are removed.
        options: What to calibrate on.

    Raises:
        TruedepthError: Text or options do not fit, or another run is at work in the directory.
    """
    source, plan = layout.source, layout.plan
    merged = [segment for segment in layout.segments if layout.is_merged(segment)]
    if not merged:
        raise TruedepthError(
            f"No group of the plan becomes a wide layer of {source.config['model_type']}: its"
            " layers run side by side as they are. Give --no-calibrate (truedepth.convert without"
            " `calibration` in Python)."
        )
    text = calibration_windows(source, options, merged)
    _, dtype = placement(source, options)
    settings: dict[str, Any] = {
        "text": [Path(path).name for path in options.text] or [DEFAULT_TEXT],
        "tokens": text.fitted.numel(),
        "own_text": options.own_share,
        "window": text.window,
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
        stack = layer_stack(source, options)
        walk = walk_through(stack, layout, text.fitted, text.check, options)
        calibrator = Calibrator(walk)
        errors: dict[str, dict[str, MapError]] = {}
        refitted: dict[str, LazyTensor] = {}
        with progress_bar("Calibrating stages", len(layout.segments)) as advance:
            for number, segment in enumerate(layout.segments):
                path = kept / f"segment-{number:04d}.safetensors"
                if segment not in merged:
                    walk.advance(segment)
                elif path.exists():
                    walk.advance(segment, load_file(path))
                else:
                    refit = calibrator.refit(segment)
                    source.check_unchanged()
                    _save(refit, path)
                if segment in merged:
                    weights, errors[_name(segment)] = _read(path)
                    refitted |= {layout.renamed(name): each for name, each in weights.items()}
                advance(1)
        check = loss_of(walk.losses()[0], text.window) if len(text.check) else None
        del walk, calibrator, stack  # their states are not needed for writing
        record = CalibrationRecord(
            **settings,
            check=check,
            held_out_errors=errors,
        )
        yield Calibrated(refitted, record)


def _name(segment: Segment) -> str:
    """`14+15` for a group, `F14 A15` for a stage."""
    if group := group_of(segment):
        return "+".join(map(str, group))
    return " ".join(map(str, segment[0]))


def _save(refit: Refit, path: Path) -> None:
    """Write a segment at once: a file of that name is complete."""
    fits = {name: (fit.penalty, fit.before, fit.after) for name, fit in refit.fits.items()}
    weights = {name: weight.cpu().contiguous() for name, weight in refit.weights.items()}
    with whole_file(path) as partial:
        save_file(weights, partial, metadata={"fits": json.dumps(fits)})


def _read(path: Path) -> tuple[dict[str, LazyTensor], dict[str, MapError]]:
    """A segment's weights, and for every map λ and its held-out errors before and after."""
    with safe_open(path, "pt") as file:
        fits = json.loads(file.metadata()["fits"])
    errors = {
        name: MapError(None if math.isinf(penalty) else penalty, round(before, 6), round(after, 6))
        for name, (penalty, before, after) in fits.items()
    }
    return {name: from_tensor(tensor) for name, tensor in load_file(path).items()}, errors
