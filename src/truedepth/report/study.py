"""What `study` prints, for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from truedepth.depth_study.result import BestSpan, Study
from truedepth.evaluation.loss import perplexity_of
from truedepth.report.tables import print_rows


def print_study(study: Study, written: Sequence[Path]) -> None:
    """Print the medians, the best spans and the correlations of a study, and the files written."""
    print_rows(
        [
            ("model", f"{study.settings['model']} ({study.settings['origin']})"),
            ("layers", str(study.num_layers)),
            ("perplexity", f"{perplexity_of(study.nll):.2f} on {study.settings['text']}"),
            ("work", f"{study.evaluated:,.0f} layer evaluations; span by span {study.naive:,.0f}"),
        ]
    )
    medians = study.medians
    if lengths := sorted({length for row in medians.values() for length in row}):
        print("\nMedian excess loss by number of layers in a span, in nats per token:\n")
        print_rows(
            [
                (name, *(f"{row[n]:+.2f}" if n in row else "-" for n in lengths))
                for name, row in medians.items()
            ],
            header=("transformation", *map(str, lengths)),
        )
    if study.best_spans:
        compared = {name for row in study.best_spans.values() for name in row}
        forms = [name for name in study.transformed if name in compared]
        print("\nBest spans by all-reduces saved (excess loss in nats per token, span):\n")
        print_rows(
            [
                (str(count), *(_span(row.get(form), study.nll) for form in forms))
                for count, row in study.best_spans.items()
            ],
            header=("saved", *forms),
            words=(),
        )
    if study.sweep:
        print("\nBest spans of consecutive pairs (excess loss in nats per token):\n")
        print_rows(
            [
                (
                    str(row.paired_layers),
                    str(row.effective_depth),
                    f"{row.best_last_layer - row.paired_layers + 1}-{row.best_last_layer}",
                    f"{perplexity_of(row.best_nll):.2f}",
                    f"{row.best_nll - study.nll:+.3f}",
                )
                for row in study.sweep
            ],
            header=("Δ", "effective depth", "layers", "perplexity", "excess loss"),
            words=(),
        )
    print("\nRank correlation of each measure with the loss of pairing:\n")
    print_rows(
        [
            (name, *(_correlation(found[kind]) for kind in ("pairs", "merges", "spans")))
            for name, found in study.correlation.items()
        ],
        header=("measure", "single pairs", "single merges", "spans of equal length"),
    )
    print(f"\nWritten to {written[0].parent}: " + ", ".join(path.name for path in written))


def _span(best: BestSpan | None, base: float) -> str:
    return "-" if best is None else f"{best.nll - base:+.3f} {best.first}-{best.last}"


def _correlation(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.2f}"
