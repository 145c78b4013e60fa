"""Ways to run a model in fewer steps, compared at equal numbers of all-reduces on the same text.

    python benchmarks/compare.py --calibration FILE [--calibration FILE…] --text FILE [--text FILE…]
        --plans PATH [--plans PATH…] --pairs PATH --raw-pairs PATH [--task-dir DIR]
        [--local PATH]… [--all-reduces 54,50,46,40,36,30] [--only METHOD]… --json PATH

The plans come from `truedepth plan MODEL --all-reduces 46 --json PATH`, and from the same command
for other numbers of all-reduces; those of pairs from
`truedepth plan MODEL --form pairs --depth 23 --frontier --json PATH`, and from the same command
with `--no-calibrate`. Rank-local plans come from `truedepth plan MODEL --all-reduces 46 --tp 3
--local --json PATH` and others like it; their ranks are simulated. Rows that are already in the
JSON file are not measured again, so the same command resumes. Rivals choose and fit on windows of
the text that this package calibrates on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import truedepth as td
from rivals import (
    drop,
    drop_by_influence,
    drop_syncs,
    ghost_layers,
    greedy_order,
    parallel_whole_layers,
    patch_linearly,
    patch_magnitudes,
    sync_order,
)
from rows import WINDOWS, Rows, parser_of
from truedepth.calibration.windows import calibration_windows
from truedepth.plan.choose import cheapest_plans
from truedepth.plan.plan import Plan
from truedepth.plan.stages import Segment, group_segment, stage_of
from truedepth.planning.options import SEARCH_CALIBRATION
from truedepth.runtime.device import fast_dtype
from truedepth.runtime.loading import Loaded

GREEDY_WINDOWS = 4  # SLEB and SPD run the model tens or hundreds of times
MORE_TOKENS = 1 << 18
RANKS = (2, 3, 4)  # that SPD is simulated on
SHOWN = ("arc_easy acc", "hellaswag acc_norm", "piqa acc")  # small models guess the rest
TASKS = ["arc_easy", "hellaswag", "piqa", "winogrande"]


Plans = dict[int, Plan]
"""By number of all-reduces."""


def pairs_of(path: Path) -> Plans:
    """The best plans of pairs that a search found."""
    found = json.loads(path.read_text())
    layers = found["plan"]["num_layers"]
    plans = (Plan(layers, point["groups"]) for point in found["frontier"])
    return {plan.all_reduces: plan for plan in plans}


def stages_of(searches: list[Path]) -> tuple[Plans, Plans]:
    """The plans of least sum of the merges' KL by the first search, as they are and refitted.

    Of refitted plans with as many stages as a search was for, it is the one that it chose.
    """
    results = [json.loads(path.read_text()) for path in searches]
    found = results[0]
    layers = found["plan"]["num_layers"]
    raw, refitted = dict[Segment, float](), dict[Segment, float]()
    for score in found["scores"]:
        segment = tuple(stage_of(names) for names in score["merged"])
        raw[segment] = score["raw"]["kl"]
        refitted[segment] = (score["refitted"] or score["raw"])["kl"]
    best = (cheapest_plans(layers, costs) for costs in (raw, refitted))
    first, second = ({n: plans[0] for n, plans in found.items()} for found in best)
    chosen = [Plan.from_dict(result["plan"]) for result in results]
    return first, second | {plan.all_reduces: plan for plan in chosen}


class Comparison:
    """An original and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source = td.open_source(arguments.model)
        self.dtype = fast_dtype(self.source, torch.device("cpu"))
        self.calibration = td.Calibration(text=arguments.calibration)
        self.raw_stages, self.stages = stages_of(arguments.plans)
        self.raw_local: Plans = {}
        self.local: Plans = {}
        if arguments.local:
            self.raw_local, self.local = stages_of(arguments.local)
        self.pairs, self.raw_pairs = pairs_of(arguments.pairs), pairs_of(arguments.raw_pairs)
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

    def row(self, method: str, all_reduces: int, make: Callable[[], tuple[Loaded, Any]]) -> None:
        """Make a model and measure it, unless that was done before."""
        key = f"{method} @ {all_reduces}"
        if key in self.rows:
            return
        start = time.perf_counter()
        loaded, what = make()
        made = time.perf_counter()
        row: dict[str, Any] = {"method": method, "all_reduces": all_reduces, "what": what}
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

    def repeat(self, method: str, other: str, all_reduces: int) -> None:
        """Copy another method's row: the model is the same."""
        row = self.rows[f"{other} @ {all_reduces}"]
        self.rows[f"{method} @ {all_reduces}"] = row | {"method": method}

    def converted(
        self, plan: Plan, calibrated: bool, tokens: int | None = None
    ) -> tuple[Loaded, str]:
        """A checkpoint of this package."""
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "out"
            tokens = tokens or self.arguments.tokens
            options = replace(self.calibration, tokens=tokens) if calibrated else None
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
            most = self.source.num_layers - min(self.arguments.all_reduces) // 2
            self.rows["SLEB order"] = greedy_order(self.load(), self.ids[:GREEDY_WINDOWS], most)
        loaded = self.load()
        drop(loaded, self.rows["SLEB order"][:count])
        return loaded, sorted(self.rows["SLEB order"][:count])

    def without_syncs(self, ranks: int, count: int) -> tuple[Loaded, list[int]]:
        """SPD on so many ranks, whose order is found once."""
        name = f"SPD order, {ranks} ranks"
        if name not in self.rows:
            self.rows[name] = sync_order(self.load(), self.ids[:GREEDY_WINDOWS], ranks)
        loaded, layers = self.load(), sorted(self.rows[name][:count])
        drop_syncs(loaded, layers, ranks)
        return loaded, layers

    def makers(self, all_reduces: int) -> dict[str, Callable[[], tuple[Loaded, Any]]]:
        """How each method makes a model of so many all-reduces."""
        layers = self.source.num_layers
        saved = 2 * layers - all_reduces
        count = saved // 2
        span = Plan.late_pairs(layers, count)
        found: dict[str, Callable[[], tuple[Loaded, Any]]] = {
            "ShortGPT": partial(self.rival, drop_by_influence, count),
            "SLEB": partial(self.greedily, count),
            "ReplaceMe": partial(self.rival, patch_linearly, count),
            "LinearPatch": partial(self.rival, patch_magnitudes, count),
            "Ghosted Layers": partial(self.rival, ghost_layers, count),
            "PAR, late span": partial(self.parallel, span),
            "LP, late span": partial(self.converted, span, calibrated=False),
            "LP, plan": partial(self.converted, self.raw_pairs[all_reduces], calibrated=False),
            "LP, late span, calibrated": partial(self.converted, span, calibrated=True),
            "LP, plan, calibrated": partial(
                self.converted, self.pairs[all_reduces], calibrated=True
            ),
        }
        for ranks in RANKS:
            found[f"SPD, {ranks} ranks"] = partial(self.without_syncs, ranks, saved)
        last = layers - 2  # the late span leaves the last layer alone
        if saved <= last:
            late = Plan.staggered(layers, last - saved, last)
            found["staggered, late span"] = partial(self.converted, late, calibrated=False)
            refitted = partial(self.converted, late, calibrated=True)
            found["staggered, late span, calibrated"] = refitted
        if plan := self.local.get(all_reduces):
            raw, name = self.raw_local[all_reduces], f"local stages, plan, {plan.ranks} ranks"
            found[name] = partial(self.converted, raw, calibrated=False)
            found[f"{name}, calibrated"] = partial(self.converted, plan, calibrated=True)
        return found | {
            "stages, plan": partial(self.converted, self.raw_stages[all_reduces], calibrated=False),
            "stages, plan, calibrated": partial(
                self.converted, self.stages[all_reduces], calibrated=True
            ),
            f"stages, plan, {MORE_TOKENS:,} tokens": partial(
                self.converted, self.stages[all_reduces], calibrated=True, tokens=MORE_TOKENS
            ),
        }


def main() -> None:
    """Measure row after row."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument(
        "--plans", type=Path, action="append", required=True, help="JSON of a search for stages"
    )
    parser.add_argument(
        "--local", type=Path, action="append", default=[], help="JSON of a search for local stages"
    )
    parser.add_argument("--pairs", type=Path, required=True, help="JSON of a search for pairs")
    parser.add_argument(
        "--raw-pairs", type=Path, required=True, help="JSON of an uncalibrated search for pairs"
    )
    parser.add_argument("--task-dir", type=Path)
    parser.add_argument("--limit", type=int, default=200, help="items per task")
    parser.add_argument("--tokens", type=int, default=1 << 16, help="tokens to calibrate on")
    parser.add_argument(
        "--all-reduces",
        type=lambda text: list(map(int, text.split(","))),
        default=[54, 50, 46, 40, 36, 30],
    )
    parser.add_argument("--only", action="append", help="measure this method; repeat for several")
    comparison = Comparison(parser.parse_args())
    layers = comparison.source.num_layers
    comparison.row("original", 2 * layers, lambda: (comparison.load(), ""))
    for number in comparison.arguments.all_reduces:
        span = Plan.late_pairs(layers, layers - number // 2)
        same = {
            "LP, plan": ("LP, late span", comparison.raw_pairs[number]),
            "LP, plan, calibrated": ("LP, late span, calibrated", comparison.pairs[number]),
        }
        for method, make in comparison.makers(number).items():
            if comparison.arguments.only and method not in comparison.arguments.only:
                continue
            other, plan = same.get(method, ("", None))
            if plan is not None and plan.groups == span.groups:
                comparison.repeat(method, other, number)
            else:
                comparison.row(method, number, make)
    print_tables([row for row in comparison.rows.values() if "method" in row])


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Markdown: excess loss on every text, and mean accuracy, by method and all-reduces."""
    original = rows[0]
    numbers = sorted({row["all_reduces"] for row in rows[1:]}, reverse=True)
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows[1:]:
        by_method.setdefault(row["method"], {})[row["all_reduces"]] = row

    def table(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        print(f"\n{title}\n\n| | {' | '.join(map(str, numbers))} |\n|---|{'---|' * len(numbers)}")
        for method, found in by_method.items():
            cells = [cell(found[number]) if number in found else "-" for number in numbers]
            print(f"| {method} | {' | '.join(cells)} |")

    texts = list(original["nll"])
    table(
        f"Excess loss, {' / '.join(texts)}",
        lambda row: " / ".join(f"{row['nll'][x] - original['nll'][x]:.3f}" for x in texts),
    )
    if "tasks" in original:
        mean = {
            id(row): sum(row["tasks"][name] for name in SHOWN) / len(SHOWN)
            for row in rows
            if "tasks" in row
        }
        title = f"Mean of {', '.join(SHOWN)}; the original has {mean[id(original)]:.1%}"
        table(title, lambda row: f"{mean[id(row)]:.1%}" if id(row) in mean else "-")


if __name__ == "__main__":
    main()
