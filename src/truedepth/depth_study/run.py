"""How deep a model really is: transform every span of its layers and measure the perplexity."""

from __future__ import annotations

import hashlib
import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers

from truedepth.depth_study.dependence import dependence, rank_correlation
from truedepth.depth_study.measurements import Measurements
from truedepth.depth_study.schedule import Runner, Schedule, in_order, layer_evaluations
from truedepth.depth_study.transformations import PAIRS, TRANSFORMATIONS, Cell, all_cells
from truedepth.errors import TruedepthError
from truedepth.evaluation.loss import perplexity_of
from truedepth.options import Bounds, checked
from truedepth.progress import progress_bar
from truedepth.runtime.device import default_device, fast_dtype
from truedepth.runtime.loading import load
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.tensors import dtype_name
from truedepth.text import DEFAULT_TEXT, default_text, read_text, token_windows, window_of
from truedepth.version import __version__

Matrix = list[list[float | None]]
"""`matrix[i][j]` for layers i <= j: the first and the last of a span, or the earlier and the later
of a pair. None where nothing was measured."""

Cells = dict[Cell, Schedule]
"""The whole model's schedule for each cell."""

WINDOW = 256  # tokens, where nothing else is said and the model has as many positions
MIN_SPANS = 5  # fewest spans of one length for a rank correlation among them


@dataclass(frozen=True)
class SweepRow:
    """The paper's sweep for one Δ: NLL of consecutive pairs, by the last layer of the span."""

    paired_layers: int
    effective_depth: int
    last_layers: list[int]
    nll: list[float]
    best_last_layer: int
    best_nll: float


@dataclass(frozen=True)
class Study:
    """The results of `truedepth study`. NLL is in nats per token."""

    settings: dict[str, Any]
    """Model, text, windows, dtype, seed and versions: what reproduces the figures."""

    num_layers: int
    nll: float
    """NLL of the original model."""

    transformed: dict[str, Matrix]
    """NLL of every span by transformation; for shuffles, the mean over permutations."""

    shuffle_spread: Matrix
    """Sample standard deviation of a shuffle's NLL over permutations; None for a single one."""

    dependence: dict[str, Matrix]
    """The measures of `dependence.py`, by name."""

    correlation: dict[str, dict[str, float]]
    """Rank correlations, by measure: of the measure with the excess loss of pairing neighbours
    (`pairs`), and of its mean over a span with the excess loss of running the span side by side
    (`spans`). The latter is taken among spans of one length and averaged over lengths, because
    longer spans always lose more."""

    evaluated: float
    """Layers that the whole study evaluates, including those measured by earlier runs."""

    naive: float
    """Layers that would be evaluated if every cell were run by itself, nothing shared."""

    @property
    def sweep(self) -> list[SweepRow]:
        """The sweep for each Δ for which pairs were measured."""
        matrix = self.transformed.get(PAIRS, _empty(self.num_layers))
        rows = []
        for paired in range(2, self.num_layers + 1, 2):
            points = {
                start + paired - 1: nll
                for start in range(self.num_layers - paired + 1)
                if (nll := matrix[start][start + paired - 1]) is not None
            }
            if points:
                best = min(points, key=points.__getitem__)
                depth = self.num_layers - paired // 2
                ends, values = list(points), list(points.values())
                rows.append(SweepRow(paired, depth, ends, values, best, points[best]))
        return rows

    @property
    def medians(self) -> dict[str, dict[int, float]]:
        """Median excess loss of all spans of 2, 4, 8, … layers, by transformation."""
        found: dict[str, dict[int, float]] = {}
        for name, matrix in self.transformed.items():
            for length in (2**power for power in range(1, self.num_layers.bit_length())):
                spans = [
                    row[start + length - 1 : start + length] for start, row in enumerate(matrix)
                ]
                losses = [nll - self.nll for span in spans for nll in span if nll is not None]
                if losses:
                    found.setdefault(name, {})[length] = statistics.median(losses)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The study as JSON-compatible data; study.json without the command."""
        correlation = {
            name: {kind: None if math.isnan(value) else value for kind, value in found.items()}
            for name, found in self.correlation.items()
        }
        return asdict(self) | {
            "perplexity": perplexity_of(self.nll),
            "correlation": correlation,
            "medians": self.medians,
            "sweep": [asdict(row) for row in self.sweep],
        }


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
    transformations: Sequence[str] = tuple(TRANSFORMATIONS),
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
        transformations: Which of `TRANSFORMATIONS`.
        seed: Random seed for the layer orders.
        device: Device to run on. Default: the first GPU, else the CPU.
        dtype: Dtype of weights and products. Default: bfloat16 on processors that are fast at it,
            else as in `load`. The residual stream is always float32.

    Raises:
        TruedepthError: The directory holds another study or cannot be written, model or text cannot
            be used, or the model's files changed meanwhile.
    """
    if unknown := sorted(set(transformations) - set(TRANSFORMATIONS)):
        raise TruedepthError(
            f"{unknown[0]!r} is not a transformation; choose from {', '.join(TRANSFORMATIONS)}."
        )
    source = open_source(model)
    source.family  # noqa: B018  an unsupported family is refused before anything is loaded
    ids = _windows(source, text, window_of(source, window, WINDOW), windows)
    device = torch.device(device or default_device())
    dtype = dtype or fast_dtype(source, device)
    identity = _identity(source, ids, dtype)
    original, pairs, spans = _schedules(source.num_layers, permutations, stride, seed)
    wanted = [s for cell, s in spans.items() if cell.transformation in transformations]
    with Measurements(Path(out).expanduser(), identity) as kept:
        runner = Runner(load(source, device=device, dtype=dtype), ids)
        _measure(runner, [original, *pairs.values(), *wanted], kept, source)
        measures = _dependence(runner)
        source.check_unchanged()
        cells = _complete(spans, kept)
        base, losses = _losses(kept, original, pairs | cells)
    transformed, spread = _by_span(source.num_layers, cells, losses)
    schedules = (pairs | cells).values()
    return Study(
        settings=_settings(source, text, identity, stride, permutations, seed),
        num_layers=source.num_layers,
        nll=base,
        transformed=transformed,
        shuffle_spread=spread,
        dependence=measures,
        correlation=_correlations(
            measures, [losses[pair] for pair in pairs], transformed.get("parallel", [])
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


def _schedules(
    layers: int, permutations: int, stride: int, seed: int
) -> tuple[Schedule, Cells, Cells]:
    """The original's schedule, those of all neighbours in parallel, and those of all spans."""
    neighbours = [Cell("parallel", layer, layer + 2) for layer in range(layers - 1)]
    spans = all_cells(layers, permutations=permutations, stride=stride)
    return (
        in_order(range(layers)),
        {cell: cell.schedule(layers) for cell in neighbours},
        {cell: cell.schedule(layers, seed) for cell in spans},
    )


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


def _dependence(runner: Runner) -> dict[str, Matrix]:
    """Every measure of `dependence.py` as a matrix, with a progress bar."""
    layers = len(runner.layers)
    with progress_bar("Dependence of layers", layers * (layers - 1) // 2) as advance:
        measures = dependence(runner, advance)
    return {name: _matrix(values) for name, values in measures.items()}


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
    spread = _empty(layers)
    for (transformation, start, end), values in orders.items():
        matrix = transformed.setdefault(transformation, _empty(layers))
        found = torch.tensor(values, dtype=torch.float64)
        matrix[start][end - 1] = found.mean().item()
        if transformation == "shuffle":
            spread[start][end - 1] = found.std().item() if len(values) > 1 else None
    return transformed, spread


def _correlations(
    measures: dict[str, Matrix], pairs: Sequence[float], parallel: Matrix
) -> dict[str, dict[str, float]]:
    """How well every measure ranks the losses of running layers side by side."""
    found = {}
    for name, matrix in measures.items():
        neighbours = [_value(matrix[i][i + 1]) for i in range(len(pairs))]
        by_length: dict[int, list[tuple[float, float]]] = {}
        for first, row in enumerate(parallel):
            for last in range(first + 1, len(row)):
                if (loss := row[last]) is not None:
                    inside = [_value(v) for line in matrix[first:last] for v in line[: last + 1]]
                    values = [value for value in inside if not math.isnan(value)]
                    by_length.setdefault(last - first, []).append((sum(values) / len(values), loss))
        enough = [spans for spans in by_length.values() if len(spans) >= MIN_SPANS]
        within = [rank_correlation(*zip(*spans, strict=True)) for spans in enough]
        found[name] = {
            "pairs": rank_correlation(neighbours, pairs),
            "spans": sum(within) / len(within) if within else math.nan,
        }
    return found


def _value(entry: float | None) -> float:
    return math.nan if entry is None else entry


def _empty(size: int) -> Matrix:
    return [[None] * size for _ in range(size)]


def _matrix(values: torch.Tensor) -> Matrix:
    return [[None if math.isnan(v) else v for v in row] for row in values.tolist()]
