"""A calibration from text to weights on disk, layer by layer, gone on with after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from truedepth.calibration import Calibrator, Refit
from truedepth.errors import TruedepthError
from truedepth.layer_stack import LayerStack
from truedepth.loading import default_device, fast_dtype
from truedepth.plan import Plan
from truedepth.progress import progress_bar
from truedepth.sources import Source
from truedepth.tensors import LazyTensor, dtype_name, from_tensor
from truedepth.text import DEFAULT_TEXT, check_window, default_text, read_text, token_windows

METHOD = 1  # raised when the same settings give other weights than before


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on, and how."""

    text: Sequence[str | Path] = ()
    """`.txt` or `.jsonl` files, each with the same share of the tokens while it lasts; by default
    the documentation that Python carries."""

    tokens: int = 1 << 16
    window: int = 512
    """Tokens a window."""

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    """In which layers compute; by default bfloat16 where that is fast."""

    activation_dtype: torch.dtype = torch.float32
    """Of the states that are kept for every token."""

    batch_size: int = 8
    """Windows a forward pass."""

    workspace: Path | None = None
    """A directory for memory-mapped states; by default they are in memory."""


@dataclass(frozen=True)
class Calibrated:
    """The refitted layers of a conversion."""

    tensors: dict[str, LazyTensor]
    """By name in the converted model, float32; mapped from files that must stay."""

    record: dict[str, Any]
    """For config.json: what it was calibrated on, and what each map gained on held-out windows."""


def calibration_windows(source: Source, plan: Plan, options: Calibration) -> Tensor:
    """The text as `[windows, window]` int64 token ids, spread evenly over every file.

    Raises:
        TruedepthError: The text is too short for the width of the widest layer.
    """
    if options.window < 2 or options.tokens < options.window:
        raise TruedepthError(
            f"{options.tokens} calibration tokens are less than a window of {options.window}."
        )
    check_window(source, options.window)
    texts = [read_text(path) for path in options.text] or [default_text()]
    parts = [token_windows(source.tokenizer, text, options.window) for text in texts]
    wanted = options.tokens // options.window
    shares = _shares([len(part) for part in parts], wanted)
    ids = torch.cat([_spread(part, share) for part, share in zip(parts, shares, strict=True)])
    needed = tokens_needed(source, plan)
    if ids.numel() < needed:
        raise TruedepthError(
            f"{ids.numel()} calibration tokens are too few: the widest map has {needed} inputs and"
            f" needs at least as many tokens; give more text or more --tokens."
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order]  # so that held-out windows come from every file


def tokens_needed(source: Source, plan: Plan) -> int:
    """As many as the widest map of the widest layer has inputs."""
    shapes = [
        source.tensors[source.family.layer.format(0) + f"{name}.weight"].shape
        for name in source.family.writes
    ]
    return max(plan.widths) * max(columns for _, columns in shapes)


def _shares(available: Sequence[int], wanted: int) -> list[int]:
    """Equal shares; what a short file lacks the others give."""
    shares = [0] * len(available)
    left = min(wanted, sum(available))
    shortest_first = sorted(range(len(available)), key=available.__getitem__)
    for done, index in enumerate(shortest_first):
        shares[index] = min(available[index], math.ceil(left / (len(available) - done)))
        left -= shares[index]
    return shares


def _spread(windows: Tensor, count: int) -> Tensor:
    """`count` of the windows, evenly spaced."""
    return windows[torch.arange(count) * len(windows) // max(1, count)]


def calibrated(
    source: Source,
    plan: Plan,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    directory: Path,
    options: Calibration,
) -> Calibrated:
    """Refit the wide layers of a conversion.

    Args:
        source: The original.
        plan: Of the conversion.
        config: config.json of the converted model.
        tensors: Of the converted model without calibration.
        directory: Keeps every layer as it is refitted. A run that finds the layers of the same
            calibration there goes on after them; those of another are removed.
        options: What to calibrate on.

    Raises:
        TruedepthError: Text or options do not fit, or another run is at work in the directory.
    """
    ids = calibration_windows(source, plan, options)
    device = torch.device(options.device or default_device())
    dtype = options.dtype or fast_dtype(source, device)
    settings = {
        "text": [Path(path).name for path in options.text] or [DEFAULT_TEXT],
        "tokens": ids.numel(),
        "window": options.window,
        "dtype": dtype_name(dtype),
        "activation_dtype": dtype_name(options.activation_dtype),
    }
    identity = {
        **settings,
        "method": METHOD,
        "model fingerprint": source.fingerprint,
        "text fingerprint": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "plan": plan.to_dict(),
        "batch_size": options.batch_size,
    }
    with _kept_layers(directory, identity) as kept:
        calibrator = Calibrator(
            source.family,
            LayerStack(source, device=device, dtype=dtype),
            LayerStack(source, device=device, dtype=dtype, config=config, tensors=tensors),
            ids,
            activation_dtype=options.activation_dtype,
            workspace=options.workspace,
            batch_size=options.batch_size,
        )
        last = max((i for i, width in enumerate(plan.widths) if width > 1), default=-1)
        gains: dict[str, Any] = {}
        replaced: dict[str, LazyTensor] = {}
        with progress_bar("Calibrating layers", last + 1) as advance:
            for index, group in enumerate(plan.groups[: last + 1]):
                path = kept / f"layer-{index:04d}.safetensors"
                if len(group) == 1:
                    calibrator.advance(index, group)
                elif path.exists():
                    calibrator.advance(index, group, load_file(path))
                else:
                    _save(calibrator.refit(index, group), path)
                if len(group) > 1:
                    weights, gains["+".join(map(str, group))] = _read(path)
                    prefix = source.family.layer.format(index)
                    replaced |= {prefix + name: tensor for name, tensor in weights.items()}
                advance(1)
    return Calibrated(replaced, settings | {"held_out_errors": gains})


@contextmanager
def _kept_layers(directory: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """The directory of this calibration's layers, locked and without those of another."""
    text = json.dumps(identity, indent=1)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise TruedepthError(f"Cannot write to {directory}: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = directory / "calibration.json"
        if not held.exists() or held.read_text(encoding="utf-8") != text:
            for path in directory.glob("layer-*.safetensors*"):
                path.unlink()
            held.write_text(text, encoding="utf-8")
        yield directory
    except BlockingIOError as error:
        raise TruedepthError(f"Another calibration is at work in {directory}.") from error
    finally:
        os.close(lock)


def _save(refit: Refit, path: Path) -> None:
    """All at once: a file of that name is whole."""
    fits = {name: (fit.penalty, fit.before, fit.after) for name, fit in refit.fits.items()}
    weights = {name: weight.cpu().contiguous() for name, weight in refit.weights.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata={"fits": json.dumps(fits)})
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.rename(path)


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
