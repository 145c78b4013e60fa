"""What healing repairs, by plan, start, objective and what is trained.

    python benchmarks/healing.py --plan FILE [--plan FILE…] --calibration FILE [--calibration FILE…]
        --train-text FILE[=W] [--train-text FILE[=W]…] [--own-answers FILE[=W]…]
        [--answer-share 0.5] [--warmup 0.05] --text FILE…
        --directory DIR --json PATH [--tokens 204800] [--runs kl,next-token,raw,lora]
        [--dtype bfloat16] [--answers 128 [--prompts FILE]] [--probes 50] [--task-dir DIR]
        [--plot PATH]

Every run heals the calibrated conversion of a plan by distillation, except for what its name says:
`next-token` (the paper's objective), `blend` (a fifth of it), `raw` (not calibrated before),
`lora`, `all`, `hidden`. Measured are losses on every text and, where an option asks for it, greedy
answers, probes and benchmarks. What is already in the JSON file is not measured again, and a run
that was cut off resumes, so the same command goes on where it stopped. The plot shows the
validations of all runs in the JSON file.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import truedepth as td
from rows import Rows, losses, parser_of
from truedepth.healing.options import Healing, Objective, TextPart, Train
from truedepth.plan.plan import Plan
from truedepth.report.plots import plot_healing
from truedepth.runtime.device import default_device, fast_dtype
from truedepth.runtime.loading import Loaded

TASKS = ["arc_easy", "hellaswag", "piqa"]


def variant(name: str, healing: Healing) -> Healing:
    """The options of a run, named `NAME` or `NAME:LEARNING-RATE`."""
    name, _, rate = name.partition(":")
    changes: dict[str, Any] = {"learning_rate": float(rate)} if rate else {}
    if name == "next-token":
        changes["objective"] = Objective(next_token=1.0)
    elif name == "blend":
        changes["objective"] = Objective(next_token=0.2)
    elif name == "hidden":
        changes["objective"] = Objective(hidden=1.0)
    elif name in ("lora", "all"):
        changes["train"] = Train(name)
    elif name not in ("kl", "raw"):
        raise SystemExit(f"There is no run {name!r}.")
    return replace(healing, **changes)


class Bench:
    """An original and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source = td.open_source(arguments.model)
        self.device = default_device()
        self.dtype = fast_dtype(self.source, torch.device(self.device))
        self.original = self.load(self.source)
        self.rows = Rows(arguments.json)

    def load(self, model: Any) -> Loaded:
        """A model to measure."""
        return td.load(model, device=self.device, dtype=self.dtype)

    def measure(self, key: str, path: Path) -> None:
        """Measure what a checkpoint loses, unless that was done before."""
        arguments, original = self.arguments, self.original
        ways: dict[str, Callable[[Loaded], Any]] = {
            "losses": lambda model: losses(model, original, arguments.text)
        }
        if arguments.answers:
            ways["generation"] = lambda model: td.generation(
                model,
                against=original,
                prompts=arguments.prompts,
                max_new_tokens=arguments.answers,
            ).to_dict()
        if arguments.probes:
            ways["probes"] = lambda model: td.probe(
                model, against=original, items=arguments.probes, lengths=[1024]
            ).to_dict()
        if arguments.task_dir:
            ways["tasks"] = lambda model: td.task_scores(
                model,
                TASKS,
                against=original,
                task_dir=arguments.task_dir,
                num_fewshot=0,
                limit=arguments.limit,
            ).to_dict()
        missing = {f"{key}: {way}": measured for way, measured in ways.items()}
        missing = {name: measured for name, measured in missing.items() if name not in self.rows}
        if not missing:
            return
        model = self.load(path)
        for name, measured in missing.items():
            self.rows[name] = measured(model)
            self.rows.show(name)

    def start(self, plan: Plan, name: str) -> Path:
        """The conversion of a plan that a run begins with."""
        path: Path = self.arguments.directory / f"{plan.all_reduces}-{name}"
        if not path.exists():
            calibration = td.Calibration(
                text=self.arguments.calibration, tokens=self.arguments.calibration_tokens
            )
            repair = calibration if name == "calibrated" else None
            td.convert(self.source, path, plan, calibration=repair)
        return path

    def heal(self, start: Path, run: str, healing: Healing, key: str) -> Path:
        """A healed checkpoint; its directory exists when the run is done."""
        out: Path = self.arguments.directory / key.replace(", ", "-").replace(" ", "-")
        if not out.exists():
            options = variant(run, healing)
            done = td.heal(start, out, teacher=self.source, healing=options)
            on = torch.cuda.get_device_name() if self.device == "cuda" else platform.machine()
            found = {"on": on, "seconds": done.seconds, "curve": done.curve}
            self.rows[key] = found | done.record.to_dict()
        return out


def main() -> None:
    """Heal, run after run; then measure what was healed, and what the runs began with."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--plan", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=1 << 16)
    parser.add_argument("--train-text", action="append", required=True)
    parser.add_argument("--own-answers", action="append", default=[])
    parser.add_argument("--answer-share", type=float, default=Healing.answer_share)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=204800)
    parser.add_argument("--batch-size", type=int, default=Healing.batch_size)
    parser.add_argument("--micro-batch-size", type=int, default=Healing.micro_batch_size)
    parser.add_argument("--eval-every", type=int, default=Healing.eval_every)
    parser.add_argument("--warmup", type=float, default=Healing.warmup)
    parser.add_argument("--runs", default="kl")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--answers", type=int, default=0, help="tokens of a greedy answer")
    parser.add_argument("--prompts", help="prompts to answer; default: the built-in ones")
    parser.add_argument("--probes", type=int, default=0, help="items of each probe")
    parser.add_argument("--task-dir", type=Path)
    parser.add_argument("--limit", type=int, default=500, help="items of each benchmark")
    parser.add_argument("--directory", type=Path, required=True, help="for checkpoints")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    healing = Healing(
        text=tuple(map(TextPart.parse, arguments.train_text)),
        own_answers=tuple(map(TextPart.parse, arguments.own_answers)),
        answer_share=arguments.answer_share,
        keep_answers=arguments.directory / "answers" if arguments.own_answers else None,
        tokens=arguments.tokens,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        eval_every=arguments.eval_every,
        warmup=arguments.warmup,
        dtype=getattr(torch, arguments.dtype),
        compile=arguments.compile,
    )
    healed, starts = {}, {}
    for path in arguments.plan:
        plan = Plan.from_yaml(path)
        for run in arguments.runs.split(","):
            name = "raw" if run.partition(":")[0] == "raw" else "calibrated"
            start = starts[f"{plan.all_reduces}, {name}"] = bench.start(plan, name)
            key = f"{plan.all_reduces}, {run}, {arguments.tokens} tokens"
            healed[key] = bench.heal(start, run, healing, key)
    for key, path in (healed | starts).items():
        bench.measure(key, path)
    if arguments.plot:
        curves = {
            key: (row["batch_size"] * row["sequence_length"], row["curve"])
            for key, row in bench.rows.items()
            if "curve" in row
        }
        plot_healing(curves, arguments.plot)


if __name__ == "__main__":
    main()
