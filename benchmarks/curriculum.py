"""Healing in two stages against healing at once, on as many tokens.

    python benchmarks/curriculum.py --plan FILE --first 12-13,16-17 --calibration FILE
        [--calibration FILE…] --train-text FILE --text FILE [--text FILE…] --directory DIR

The pairs of `--first` alone are calibrated and healed on half of the tokens. Then they replace the
same pairs in the calibrated conversion of the whole plan, which is healed on the other half.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import truedepth as td
from truedepth.calibration.options import Calibration
from truedepth.healing.options import Healing, TextPart
from truedepth.plan.plan import Plan
from truedepth.plan.spans import parse_span

WINDOWS = 64
WEIGHTS = "model.safetensors"


def main() -> None:
    """Run both stages, and print the losses before and after the second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="default")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--first", required=True)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--train-text", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=204800)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--directory", type=Path, required=True)
    given = parser.parse_args()
    whole = Plan.from_yaml(given.plan)
    pairs = [parse_span(pair) for pair in given.first.split(",")]
    first = Plan(whole.num_layers, [range(start, stop + 1) for start, stop in pairs])
    calibration = Calibration(text=given.calibration)

    def healed(checkpoint: Path, out: Path, seed: int) -> Path:
        options = Healing(
            text=(TextPart(given.train_text),),
            tokens=given.tokens // 2,
            batch_size=given.batch_size,
            micro_batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            dtype=torch.bfloat16,
            seed=seed,
        )
        td.heal(checkpoint, out, teacher=given.model, healing=options, force=True)
        return out

    directory: Path = given.directory

    def path(name: str) -> Path:
        return directory / name

    td.convert(given.model, path("first"), first, calibration=calibration, force=True)
    td.convert(given.model, path("whole"), whole, calibration=calibration, force=True)
    stage = load_file(healed(path("first"), path("first-healed"), 0) / WEIGHTS)
    weights = load_file(path("whole") / WEIGHTS)
    for group in (group for group in first.groups if len(group) > 1):
        before, now = (f"model.layers.{plan.groups.index(group)}." for plan in (first, whole))
        weights |= {
            now + name.removeprefix(before): tensor
            for name, tensor in stage.items()
            if name.startswith(before)
        }
    shutil.rmtree(path("joined"), ignore_errors=True)
    shutil.copytree(path("whole"), path("joined"))
    save_file(weights, path("joined") / WEIGHTS, metadata={"format": "pt"})
    original = td.load(given.model, dtype=torch.bfloat16)
    for checkpoint in (path("joined"), healed(path("joined"), path("joined-healed"), 1)):
        model = td.load(checkpoint, dtype=torch.bfloat16)
        for text in given.text:
            lost = td.perplexity(model, against=original, text=text, windows=WINDOWS)
            print(f"{checkpoint.name}, {text.name}: excess {lost.excess:.4f}, KL {lost.kl:.4f}")


if __name__ == "__main__":
    main()
