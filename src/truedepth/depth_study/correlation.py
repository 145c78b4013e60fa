"""How well the measures of dependence rank what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Matrix = list[list[float | None]]
"""`matrix[i][j]` for i <= j: the first and the last layer of a span, or the earlier and the later
one of a pair. None where nothing was measured."""

MIN_SPANS = 5  # fewest spans of one length for a rank correlation among them


def empty_matrix(size: int) -> Matrix:
    """A matrix of which nothing was measured."""
    return [[None] * size for _ in range(size)]


def correlations(
    layers: Mapping[str, Matrix],
    sublayers: Mapping[str, Matrix],
    pairs: Sequence[float],
    merges: Sequence[float],
    parallel: Matrix,
) -> dict[str, dict[str, float]]:
    """Rank correlations of every measure with losses, NaN where too few were measured.

    Args:
        layers: Each measure between layers.
        sublayers: Each measure between sub-layers.
        pairs: The loss of running each two neighbouring layers side by side.
        merges: The loss of each two neighbouring sub-layers in one stage; may be empty.
        parallel: The loss of every span side by side; may be empty.

    Returns:
        By measure: `pairs`, of neighbouring layers; `merges`, of neighbouring sub-layers; `spans`,
        of the measure's mean over a span with the loss of the span side by side. The latter is
        taken among spans of one length and averaged over lengths, because longer spans always lose
        more.
    """
    return {
        name: {
            "pairs": _of_neighbours(layers[name], pairs),
            "merges": _of_neighbours(sublayers[name], merges),
            "spans": _of_spans(layers[name], parallel),
        }
        for name in layers
    }


def _of_neighbours(measure: Matrix, losses: Sequence[float]) -> float:
    return rank_correlation([_value(measure[i][i + 1]) for i in range(len(losses))], losses)


def _of_spans(measure: Matrix, losses: Matrix) -> float:
    by_length: dict[int, list[tuple[float, float]]] = {}
    for first, row in enumerate(losses):
        for last in range(first + 1, len(row)):
            if (loss := row[last]) is not None:
                inside = [_value(v) for line in measure[first:last] for v in line[: last + 1]]
                values = [value for value in inside if not math.isnan(value)]
                by_length.setdefault(last - first, []).append((sum(values) / len(values), loss))
    enough = [spans for spans in by_length.values() if len(spans) >= MIN_SPANS]
    within = [rank_correlation(*zip(*spans, strict=True)) for spans in enough]
    return sum(within) / len(within) if within else math.nan


def _value(entry: float | None) -> float:
    return math.nan if entry is None else entry


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; ties get their mean rank. NaN for fewer than three values."""
    if len(first) < 3:
        return float("nan")
    ranks = torch.stack([_ranks(torch.tensor(v, dtype=torch.float64)) for v in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    smaller = (values[:, None] > values[None]).sum(1)
    equal = (values[:, None] == values[None]).sum(1)
    return smaller + (equal - 1) / 2
