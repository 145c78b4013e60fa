"""How deep is a model really: every span of its layers transformed, and perplexity watched."""

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
from truedepth.text import DEFAULT_TEXT, check_window, default_text, read_text, token_windows
from truedepth.version import __version__

Matrix = list[list[float | None]]
"""`matrix[i][j]`, i <= j, of two layers: the first and the last of a span, or an earlier and a
later one. None where nothing was measured."""

MIN_SPANS = 5  # of one length, for a rank correlation among them


@dataclass(frozen=True)
class SweepRow:
    """The paper's sweep for one Δ: consecutive pairs, against where the paired span ends."""

    paired_layers: int
    effective_depth: int
    last_layers: list[int]
    nll: list[float]
    best_last_layer: int
    best_nll: float


@dataclass(frozen=True)
class Study:
    """What `truedepth study` found. NLL in nats a token."""

    settings: dict[str, Any]
    """Model, text, windows, dtype, seed, versions: what makes the figures again."""

    num_layers: int
    nll: float
    """Of the original."""

    transformed: dict[str, Matrix]
    """NLL of every span under every transformation; of shuffles the mean over permutations."""

    shuffle_spread: Matrix
    """Sample standard deviation of a shuffle's NLL over permutations; None for one."""

    dependence: dict[str, Matrix]
    """Every measure of `dependence.py`."""

    correlation: dict[str, dict[str, float]]
    """Rank correlation of every measure with the excess loss of pairing neighbours (`pairs`), and
    of its mean over a span with that of running the span side by side (`spans`): among spans of the
    same length, averaged over lengths, for a longer span always loses more."""

    evaluated: float
    """Layers that the study evaluates, begun from nothing."""

    naive: float
    """Layers that running every cell by itself would evaluate, those of the same schedule too."""

    @property
    def sweep(self) -> list[SweepRow]:
        """Perplexity against the end of the span for each Δ, where pairs were measured."""
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
        """Median excess loss by transformation, of all spans of 2, 4, 8, … layers."""
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
        """study.json."""
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
    window: Annotated[int, Bounds(2)] = 256,
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
        out: The study's directory. What it holds of the same study is not measured again, and what
            is measured is kept there as it comes. What it holds whole of other transformations is
            reported too.
        text: A `.txt` or `.jsonl` file. Default: Python's own documentation.
        window: Tokens per window.
        windows: Number of windows, from the beginning of the text.
        stride: Study only spans that begin and end at multiples of this number of layers.
        permutations: Number of random layer orders per span.
        transformations: Which of `TRANSFORMATIONS`.
        seed: Random seed for the layer orders.
        device: Device to run on. Default: the first GPU, else the CPU.
        dtype: Of weights and products; by default bfloat16 on processors that are fast at it, else
            as `load`. The residual stream is float32 in any case.

    Raises:
        TruedepthError: The directory holds another study or cannot be written, model or text cannot
            be used, or the model's files changed meanwhile.
    """
    if unknown := sorted(set(transformations) - set(TRANSFORMATIONS)):
        raise TruedepthError(
            f"{unknown[0]!r} is not a transformation; there are {', '.join(TRANSFORMATIONS)}."
        )
    source = open_source(model)
    source.family  # noqa: B018  refused before anything is loaded
    ids = _windows(source, text, window, windows)
    device = torch.device(device or default_device())
    dtype = dtype or fast_dtype(source, device)
    identity = {
        "window": window,
        "windows": windows,
        "dtype": dtype_name(dtype),
        "model fingerprint": source.fingerprint,
        "text fingerprint": hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16],
    }
    layers = source.num_layers
    original = in_order(range(layers))
    pairs = {
        cell: cell.schedule(layers)
        for cell in (Cell("parallel", layer, layer + 2) for layer in range(layers - 1))
    }
    possible = {
        cell: cell.schedule(layers, seed)
        for cell in all_cells(layers, permutations=permutations, stride=stride)
    }
    wanted = {cell: s for cell, s in possible.items() if cell.transformation in transformations}
    with Measurements(Path(out).expanduser(), identity) as kept:
        runner = Runner(load(source, device=device, dtype=dtype), ids)
        _measure(runner, [original, *pairs.values(), *wanted.values()], kept, source)
        lacking = {cell.transformation for cell, s in possible.items() if s not in kept}
        cells = {cell: s for cell, s in possible.items() if cell.transformation not in lacking}
        with progress_bar("Dependence of layers", layers * (layers - 1) // 2) as advance:
            measures = dependence(runner, advance)
        source.check_unchanged()
        losses = {cell: kept[s].mean().item() for cell, s in (pairs | cells).items()}
        base = kept[original].mean().item()
    if not all(map(math.isfinite, [base, *losses.values()])):
        raise TruedepthError(
            "The model gives logits that are not finite numbers; try --dtype float32.", 1
        )
    matrices = {name: _matrix(values) for name, values in measures.items()}
    transformed, spread = _by_span(layers, cells, losses)
    schedules = (pairs | cells).values()
    return Study(
        settings={
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
        },
        num_layers=layers,
        nll=base,
        transformed=transformed,
        shuffle_spread=spread,
        dependence=matrices,
        correlation=_correlations(
            matrices, [losses[pair] for pair in pairs], transformed.get("parallel", [])
        ),
        evaluated=layer_evaluations([original, *schedules]),
        naive=sum(layer_evaluations([schedule]) for schedule in schedules),
    )


def _windows(source: Source, text: str | Path | None, window: int, windows: int) -> torch.Tensor:
    """Exactly so many windows of the text."""
    check_window(source, window)
    content = default_text() if text is None else read_text(text)
    ids = token_windows(source.tokenizer, content, window, windows)
    if len(ids) < windows:
        raise TruedepthError(
            f"The text has {len(ids)} windows of {window} tokens, not {windows}; give more text or"
            " fewer --windows."
        )
    return ids


def _measure(
    runner: Runner, schedules: Sequence[Schedule], kept: Measurements, source: Source
) -> None:
    """Run those schedules that are not kept yet."""
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
    """Mean NLL of every span by transformation, and the spread of shuffles."""
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
    """How well every measure ranks what running layers side by side costs."""
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
