"""How deep a model really is: transform every span of its layers and measure the perplexity."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers

from truedepth.depth_study.correlation import Matrix, correlations, empty_matrix
from truedepth.depth_study.dependence import dependence, sublayer_dependence
from truedepth.depth_study.measurements import Measurements
from truedepth.depth_study.result import Study
from truedepth.depth_study.schedule import Runner, Schedule, in_order, layer_evaluations
from truedepth.depth_study.transformations import (
    BLOCKS,
    MERGE,
    OF_SUBLAYERS,
    STAGGERED,
    TRANSFORMATIONS,
    Cell,
    all_cells,
)
from truedepth.errors import TruedepthError
from truedepth.options import Bounds, checked
from truedepth.progress import progress_bar
from truedepth.runtime.device import device_of, fast_dtype
from truedepth.runtime.empty import empty_model, transformers_config
from truedepth.runtime.loading import load
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.tensors import dtype_name
from truedepth.text import DEFAULT_TEXT, default_text, read_text, token_windows, window_of
from truedepth.version import __version__

Cells = dict[Cell, Schedule]
"""The whole model's schedule for each cell."""

WINDOW = 256  # tokens, where nothing else is said and the model has as many positions


@checked
def study(
    model: str | Path | Source,
    out: str | Path,
    *,
    text: str | Path | None = None,
    window: Annotated[int | None, Bounds(2)] = None,
    windows: Annotated[int, Bounds(1)] = 16,
    stride: Annotated[int, Bounds(1)] = 1,
    permutations: Annotated[int, Bounds(1)] = 2,
    transformations: Sequence[str] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Study:
    """Transform every span of a model's layers and measure what it costs.

    Args:
        model: An original model; anything that `open_source` takes.
        out: The study's directory. Every measurement is written there as it comes, and is not made
            again by later runs. Other transformations that are complete there are reported too.
        text: A `.txt` or `.jsonl` file. Default: Python's own documentation.
        window: Tokens per window. Default: 256, or the model's positions if these are fewer.
        windows: Number of windows, from the beginning of the text.
        stride: Study only spans that begin and end at multiples of this number of layers.
        permutations: Number of random layer orders per span.
        transformations: Which of `TRANSFORMATIONS`. Default: all that change this family's layers.
        seed: Random seed for the layer orders.
        device: Device to run on. Default: the first GPU, else the CPU.
        dtype: Dtype of weights and products. Default: bfloat16 on processors that are fast at it,
            else as in `load`. The residual stream is always float32.

    Raises:
        TruedepthError: The directory holds another study or cannot be written, model, text or
            device cannot be used, a transformation is unknown or changes nothing in layers of this
            family, or the model's files changed meanwhile.
    """
    source = open_source(model)
    source.check_plain("which truedepth does not compute with")
    possible = _possible(source, transformations)
    transformations = possible if transformations is None else transformations
    ids = _windows(source, text, window_of(source, window, WINDOW), windows)
    device = device_of(device)
    dtype = dtype or fast_dtype(source, device)
    identity = _identity(source, ids, dtype)
    layers = source.num_layers
    original, pairs, merges = in_order(range(layers)), _pairs(layers), _merges(layers, possible)
    spans = {
        cell: cell.schedule(layers, seed)
        for cell in all_cells(
            layers, permutations=permutations, stride=stride, transformations=possible
        )
    }
    wanted = [s for cell, s in spans.items() if cell.transformation in transformations]
    with Measurements(Path(out).expanduser(), identity) as kept:
        runner = Runner(load(source, device=device, dtype=dtype), ids)
        always = pairs | merges
        _measure(runner, [original, *always.values(), *wanted], kept, source)
        measures = _dependence(runner)
        source.check_unchanged()
        cells = _complete(spans, kept)
        base, losses = _losses(kept, original, always | cells)
    transformed, spread = _by_span(layers, cells, losses)
    schedules = (always | cells).values()
    return Study(
        settings=_settings(source, text, identity, stride, permutations, seed),
        num_layers=layers,
        nll=base,
        transformed=transformed,
        shuffle_spread=spread,
        dependence=measures[0],
        sublayer_dependence=measures[1],
        correlation=correlations(
            *measures,
            [losses[pair] for pair in pairs],
            [losses[merge] for merge in merges],
            transformed.get("parallel", []),
        ),
        evaluated=layer_evaluations([original, *schedules]),
        naive=sum(layer_evaluations([schedule]) for schedule in schedules),
    )


def _identity(source: Source, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What must be equal for measurements to be comparable."""
    return {
        "window": ids.shape[1],
        "windows": len(ids),
        "dtype": dtype_name(dtype),
        "model fingerprint": source.fingerprint,
        "text fingerprint": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
    }


def _settings(
    source: Source,
    text: str | Path | None,
    identity: dict[str, Any],
    stride: int,
    permutations: int,
    seed: int,
) -> dict[str, Any]:
    """`Study.settings`."""
    return {
        "model": source.name,
        "origin": source.origin,
        "text": DEFAULT_TEXT if text is None else Path(text).name,
        **identity,
        "stride": stride,
        "permutations": permutations,
        "seed": seed,
        "truedepth": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def _possible(source: Source, wanted: Sequence[str] | None) -> list[str]:
    """The transformations that change layers of this family.

    Raises:
        TruedepthError: The family is not supported, or one that is wanted is not among them.
    """
    parallel = source.family.is_parallel(transformers_config(source.config, source.path))
    possible = [name for name in TRANSFORMATIONS if not (parallel and name in OF_SUBLAYERS)]
    if not _are_alike(empty_model(source.config, source.path).base_model.layers):
        possible.remove(MERGE)
    for name in sorted(set(wanted or ()) - set(possible)):
        if name == MERGE:
            raise TruedepthError(
                f"{name!r} takes the mean of layers, but those of {source.name} have different"
                " parameters."
            )
        if name in TRANSFORMATIONS:
            raise TruedepthError(
                f"{name!r} changes nothing in {source.name}: attention and FFN of its layers read"
                " one state already."
            )
        raise TruedepthError(
            f"{name!r} is not a transformation; choose from {', '.join(possible)}."
        )
    return possible


def _are_alike(layers: Iterable[torch.nn.Module]) -> bool:
    """Whether layers have parameters of the same names and shapes."""
    first, *others = [{n: p.shape for n, p in layer.named_parameters()} for layer in layers]
    return all(other == first for other in others)


def _pairs(layers: int) -> Cells:
    """All neighbouring layers side by side."""
    cells = [Cell("parallel", layer, layer + 2) for layer in range(layers - 1)]
    return {cell: cell.schedule(layers) for cell in cells}


def _merges(layers: int, possible: Sequence[str]) -> Cells:
    """All neighbouring sub-layers in one stage: `[A0 F0]`, `[F0 A1]`, `[A1 F1]`, …"""
    spans = [(BLOCKS, 1, k) for k in range(layers)] + [(STAGGERED, 2, k) for k in range(layers - 1)]
    cells = [
        Cell(name, first, first + size)
        for name, size, first in sorted(spans, key=lambda span: (span[2], span[1]))
        if name in possible
    ]
    return {cell: cell.schedule(layers) for cell in cells}


def _complete(spans: Cells, kept: Measurements) -> Cells:
    """The cells of the transformations of which every span has been measured."""
    lacking = {cell.transformation for cell, schedule in spans.items() if schedule not in kept}
    return {cell: s for cell, s in spans.items() if cell.transformation not in lacking}


def _losses(
    kept: Measurements, original: Schedule, cells: Cells
) -> tuple[float, dict[Cell, float]]:
    """Mean NLL of the original and of every cell; refuses figures that are not finite."""
    base = kept[original].mean().item()
    losses = {cell: kept[schedule].mean().item() for cell, schedule in cells.items()}
    if not all(map(math.isfinite, [base, *losses.values()])):
        raise TruedepthError(
            "The model gives logits that are not finite numbers; try --dtype float32.", 1
        )
    return base, losses


def _dependence(runner: Runner) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Every measure of `dependence.py`, of layers and of sub-layers, with a progress bar."""
    count = len(runner.layers)
    pairs = count * (count - 1) // 2 + count * (2 * count - 1)
    with progress_bar("Dependence", pairs) as advance:
        measured = dependence(runner, advance), sublayer_dependence(runner, advance)
    layers, sublayers = ({name: _matrix(m) for name, m in each.items()} for each in measured)
    return layers, sublayers


def _windows(source: Source, text: str | Path | None, window: int, windows: int) -> torch.Tensor:
    """The first `windows` windows of the text, `[windows, window]`; fewer are an error."""
    content = default_text() if text is None else read_text(text)
    ids = token_windows(source, content, window, windows)
    if len(ids) < windows:
        raise TruedepthError(
            f"The text has {len(ids)} windows of {window} tokens, not {windows}; give more text or"
            " fewer --windows."
        )
    return ids


def _measure(
    runner: Runner, schedules: Sequence[Schedule], kept: Measurements, source: Source
) -> None:
    """Run the schedules that have not been measured yet, and keep their NLL."""
    missing = {schedule for schedule in schedules if schedule not in kept}
    done = runner.evaluated
    with progress_bar("Layers", math.ceil(layer_evaluations(missing))) as advance:
        for schedule, nll in runner.run(missing):
            source.check_unchanged()  # the model's weights are mapped from its files
            kept.add(schedule, nll)
            advance(runner.evaluated - done)
            done = runner.evaluated


def _by_span(
    layers: int, cells: Iterable[Cell], losses: Mapping[Cell, float]
) -> tuple[dict[str, Matrix], Matrix]:
    """Mean NLL of every span, by transformation, and the spread of the shuffles."""
    orders: dict[tuple[str, int, int], list[float]] = {}
    for cell in cells:
        orders.setdefault((cell.transformation, cell.start, cell.end), []).append(losses[cell])
    transformed: dict[str, Matrix] = {}
    spread = empty_matrix(layers)
    for (transformation, start, end), values in orders.items():
        matrix = transformed.setdefault(transformation, empty_matrix(layers))
        found = torch.tensor(values, dtype=torch.float64)
        matrix[start][end - 1] = found.mean().item()
        if transformation == "shuffle":
            spread[start][end - 1] = found.std().item() if len(values) > 1 else None
    return transformed, spread


def _matrix(values: torch.Tensor) -> Matrix:
    return [[None if math.isnan(v) else v for v in row] for row in values.tolist()]
