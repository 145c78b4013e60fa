"""What healing repairs: excess loss against tokens, by plan, start, objective and what is trained.

    python benchmarks/healing.py --plan FILE [--plan FILE…] --calibration FILE [--calibration FILE…]
        --train-text FILE --text FILE [--text FILE…] --directory DIR --json PATH
        [--tokens 204800] [--runs kl,next-token,raw,lora] [--dtype bfloat16]

Every run heals the calibrated conversion of a plan by distillation, except for what its name says:
`next-token` (the paper's objective), `blend` (a fifth of it), `raw` (not calibrated before),
`lora`, `all`, `hidden`. Rows that are already in the JSON file are not measured again, so the same
command resumes.
"""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import truedepth as td
from rows import Rows, losses, parser_of
from truedepth.healing.options import Healing, Objective, TextPart, Train
from truedepth.plan.plan import Plan
from truedepth.runtime.device import default_device, fast_dtype

STARTS = ("raw", "calibrated")


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


def main() -> None:
    """Heal and measure, row after row; the first rows of a plan are its conversions."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--plan", type=Path, action="append", required=True)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--calibration-tokens", type=int, default=1 << 16)
    parser.add_argument("--train-text", action="append", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=204800)
    parser.add_argument("--batch-size", type=int, default=Healing.batch_size)
    parser.add_argument("--micro-batch-size", type=int, default=Healing.micro_batch_size)
    parser.add_argument("--eval-every", type=int, default=5)
    parser.add_argument("--runs", default="kl")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--directory", type=Path, required=True, help="for checkpoints")
    arguments = parser.parse_args()
    source = td.open_source(arguments.model)
    device = default_device()
    dtype = fast_dtype(source, torch.device(device))
    original = td.load(source, device=device, dtype=dtype)
    rows = Rows(arguments.json)

    def measure(key: str, path: Path, more: dict[str, Any]) -> None:
        loaded = td.load(path, device=device, dtype=dtype)
        rows[key] = more | {"losses": losses(loaded, original, arguments.text)}
        rows.show(key, "losses")

    processor = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    healing = Healing(
        text=tuple(map(TextPart.parse, arguments.train_text)),
        tokens=arguments.tokens,
        batch_size=arguments.batch_size,
        micro_batch_size=arguments.micro_batch_size,
        eval_every=arguments.eval_every,
        dtype=getattr(torch, arguments.dtype),
    )
    for path in arguments.plan:
        plan = Plan.from_yaml(path)
        starts = {name: arguments.directory / f"{plan.effective_depth}-{name}" for name in STARTS}
        for name, start in starts.items():
            calibration = td.Calibration(
                text=arguments.calibration, tokens=arguments.calibration_tokens
            )
            if not start.exists():
                repair = calibration if name == "calibrated" else None
                td.convert(source, start, plan, calibration=repair)
            if (key := f"{plan.effective_depth}, {name}") not in rows:
                measure(key, start, {"plan": plan.to_dict()})
        for run in arguments.runs.split(","):
            key = f"{plan.effective_depth}, {run}, {arguments.tokens} tokens"
            if key in rows:
                continue
            start = starts["raw" if run.partition(":")[0] == "raw" else "calibrated"]
            out = arguments.directory / key.replace(", ", "-").replace(" ", "-").replace(":", "-")
            options = variant(run, healing)
            done = td.heal(start, out, teacher=source, healing=options, force=True)
            measure(
                key,
                out,
                {
                    "on": processor,
                    "seconds": done.seconds,
                    "curve": done.curve,
                    **done.record.to_dict(),
                },
            )


if __name__ == "__main__":
    main()
