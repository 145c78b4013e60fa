"""What a study found."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from truedepth.depth_study.correlation import Matrix, empty_matrix
from truedepth.depth_study.transformations import BLOCKS, PAIRS, STAGGERED, saved
from truedepth.evaluation.loss import perplexity_of


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
class BestSpan:
    """The span that loses least of those that save a number of all-reduces in one form."""

    first: int
    last: int
    nll: float


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
    """The measures of `dependence.py` between layers, by name."""

    sublayer_dependence: dict[str, Matrix]
    """The same between sub-layers, in the order A0 F0 A1 F1 …"""

    correlation: dict[str, dict[str, float]]
    """Rank correlations by measure, see `correlation.py`."""

    evaluated: float
    """Layers that the whole study evaluates, including those measured by earlier runs."""

    naive: float
    """Layers that would be evaluated if every cell were run by itself, nothing shared."""

    @property
    def sweep(self) -> list[SweepRow]:
        """The sweep for each Δ for which pairs were measured."""
        matrix = self.transformed.get(PAIRS, empty_matrix(self.num_layers))
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

    @property
    def best_spans(self) -> dict[int, dict[str, BestSpan]]:
        """By the number of all-reduces that they save, and by form: what the unit is worth."""
        found: dict[int, dict[str, BestSpan]] = {}
        for form in (PAIRS, STAGGERED, BLOCKS):
            for first, row in enumerate(self.transformed.get(form, ())):
                for last, nll in enumerate(row):
                    count = saved(form, last - first + 1)
                    if nll is None or not count:
                        continue
                    best = found.setdefault(count, {}).get(form)
                    if best is None or nll < best.nll:
                        found[count][form] = BestSpan(first, last, nll)
        return dict(sorted(found.items()))

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
            "best_spans": {
                count: {form: asdict(best) for form, best in forms.items()}
                for count, forms in self.best_spans.items()
            },
        }
