"""Ways to make a model shallower, compared at equal effective depth on the same text and tasks.

    python benchmarks/compare.py --calibration FILE [--calibration FILE…] --text FILE [--text FILE…]
        --plans PATH --raw-plans PATH [--task-dir DIR] [--depths 27,25,23,20,15] --json PATH

The plans come from `truedepth plan MODEL --form pairs --depth 23 --frontier --json PATH`, and from
the same command with `--no-calibrate`. Rows that are already in the JSON file are not measured
again, so the same command resumes. Rivals choose and fit on windows of the text that this package
calibrates on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import truedepth as td
from rivals import drop, drop_by_influence, greedy_order, parallel_whole_layers, patch_linearly
from rows import WINDOWS, Rows, parser_of
from truedepth.calibration.windows import calibration_windows
from truedepth.plan.plan import Plan
from truedepth.plan.stages import group_segment
from truedepth.planning.options import SEARCH_CALIBRATION
from truedepth.runtime.device import fast_dtype
from truedepth.runtime.loading import Loaded

GREEDY_WINDOWS = 4  # SLEB runs the model hundreds of times
SHOWN = ("arc_easy acc", "hellaswag acc_norm", "piqa acc")  # small models guess the rest
TASKS = ["arc_easy", "hellaswag", "piqa", "winogrande"]


def plans_of(path: Path) -> dict[int, Plan]:
    """The best plan that a search found, by effective depth."""
    found = json.loads(path.read_text())
    layers = found["plan"]["num_layers"]
    return {point["effective_depth"]: Plan(layers, point["groups"]) for point in found["frontier"]}


class Comparison:
    """An original and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source = td.open_source(arguments.model)
        self.dtype = fast_dtype(self.source, torch.device("cpu"))
        self.calibration = td.Calibration(text=arguments.calibration, tokens=arguments.tokens)
        self.plans = plans_of(arguments.plans)
        self.raw_plans = plans_of(arguments.raw_plans)
        self.rows = Rows(arguments.json)
        self._ids: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """What rivals choose and fit on: as many tokens as a search does."""
        if self._ids is None:
            options = td.Calibration(
                text=self.arguments.calibration, tokens=SEARCH_CALIBRATION.tokens, own_text=0.0
            )
            self._ids = calibration_windows(self.source, options, [group_segment((0, 1))]).fitted
        return self._ids

    def load(self, model: Any = None) -> Loaded:
        """A fresh copy, by default of the original."""
        return td.load(self.source if model is None else model, dtype=self.dtype)

    def row(self, method: str, depth: int, make: Callable[[], tuple[Loaded, Any]]) -> None:
        """Make a model and measure it, unless that was done before."""
        key = f"{method} @ {depth}"
        if key in self.rows:
            return
        start = time.perf_counter()
        loaded, what = make()
        made = time.perf_counter()
        row: dict[str, Any] = {"method": method, "depth": depth, "what": what}
        row["nll"] = {
            path.name: td.perplexity(loaded, text=path, windows=WINDOWS).nll
            for path in self.arguments.text
        }
        if self.arguments.task_dir is not None:
            found = td.task_scores(
                loaded,
                TASKS,
                task_dir=self.arguments.task_dir,
                num_fewshot=0,
                limit=self.arguments.limit,
            )
            row["tasks"] = {f"{s.task} {s.metric}": s.value for s in found.scores}
        row["seconds"] = {"made": made - start, "measured": time.perf_counter() - made}
        self.rows[key] = row
        self.rows.show(key)

    def repeat(self, method: str, other: str, depth: int) -> None:
        """Copy another method's row: the model is the same."""
        self.rows[f"{method} @ {depth}"] = self.rows[f"{other} @ {depth}"] | {"method": method}

    def converted(self, plan: Plan, calibrated: bool) -> tuple[Loaded, str]:
        """A checkpoint of this package."""
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out"
            options = self.calibration if calibrated else None
            td.convert(self.source, out, plan, calibration=options)
            loaded = self.load(out)
            loaded.tokenizer  # noqa: B018  read before the directory goes
            return loaded, str(plan)

    def parallel(self, plan: Plan) -> tuple[Loaded, str]:
        """PAR on the same span as the paper's form."""
        loaded = self.load()
        parallel_whole_layers(loaded, plan)
        return loaded, str(plan)

    def rival(self, cut: Callable[[Loaded, Tensor, int], Any], count: int) -> tuple[Loaded, Any]:
        """Apply a method of `rivals` that removes `count` layers."""
        loaded = self.load()
        return loaded, cut(loaded, self.ids, count)

    def greedily(self, count: int) -> tuple[Loaded, list[int]]:
        """SLEB, whose order is found once."""
        if "SLEB order" not in self.rows:
            most = self.source.num_layers - min(self.arguments.depths)
            self.rows["SLEB order"] = greedy_order(self.load(), self.ids[:GREEDY_WINDOWS], most)
        loaded = self.load()
        drop(loaded, self.rows["SLEB order"][:count])
        return loaded, sorted(self.rows["SLEB order"][:count])


def main() -> None:
    """Measure row after row."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--plans", type=Path, required=True, help="JSON of a search")
    parser.add_argument(
        "--raw-plans", type=Path, required=True, help="JSON of an uncalibrated search"
    )
    parser.add_argument("--task-dir", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="items per task")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="tokens to calibrate on")
    parser.add_argument(
        "--depths", type=lambda text: list(map(int, text.split(","))), default=[27, 25, 23, 20, 15]
    )
    comparison = Comparison(parser.parse_args())
    layers = comparison.source.num_layers
    comparison.row("original", layers, lambda: (comparison.load(), ""))
    for depth in comparison.arguments.depths:
        count = layers - depth
        span = Plan.late_pairs(layers, count)
        makers: dict[str, Callable[[], tuple[Loaded, Any]]] = {
            "ShortGPT": partial(comparison.rival, drop_by_influence, count),
            "SLEB": partial(comparison.greedily, count),
            "ReplaceMe": partial(comparison.rival, patch_linearly, count),
            "PAR, late span": partial(comparison.parallel, span),
            "LP, late span": partial(comparison.converted, span, calibrated=False),
            "LP, plan": partial(
                comparison.converted, comparison.raw_plans[depth], calibrated=False
            ),
            "LP, late span, calibrated": partial(comparison.converted, span, calibrated=True),
            "LP, plan, calibrated": partial(
                comparison.converted, comparison.plans[depth], calibrated=True
            ),
        }
        same = {
            "LP, plan": ("LP, late span", comparison.raw_plans[depth]),
            "LP, plan, calibrated": ("LP, late span, calibrated", comparison.plans[depth]),
        }
        for method, make in makers.items():
            other, plan = same.get(method, ("", None))
            if plan is not None and plan.groups == span.groups:
                comparison.repeat(method, other, depth)
            else:
                comparison.row(method, depth, make)
    print_tables([row for row in comparison.rows.values() if "method" in row])


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Markdown: excess loss on every text, and mean accuracy, by method and depth."""
    original = rows[0]
    depths = list(dict.fromkeys(row["depth"] for row in rows[1:]))
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows[1:]:
        by_method.setdefault(row["method"], {})[row["depth"]] = row

    def table(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        print(f"\n{title}\n\n| | {' | '.join(map(str, depths))} |\n|---|{'---|' * len(depths)}")
        for method, found in by_method.items():
            cells = [cell(found[depth]) if depth in found else "-" for depth in depths]
            print(f"| {method} | {' | '.join(cells)} |")

    texts = list(original["nll"])
    table(
        f"Excess loss, {' / '.join(texts)}",
        lambda row: " / ".join(f"{row['nll'][x] - original['nll'][x]:.3f}" for x in texts),
    )
    if "tasks" in original:
        mean = {id(row): sum(row["tasks"][name] for name in SHOWN) / len(SHOWN) for row in rows}
        title = f"Mean of {', '.join(SHOWN)}; the original has {mean[id(original)]:.1%}"
        table(title, lambda row: f"{mean[id(row)]:.1%}")


if __name__ == "__main__":
    main()
