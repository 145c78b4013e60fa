"""Stages trained one at a time toward the original's states, after calibration.

    python benchmarks/stage_by_stage.py --plan FILE --calibration FILE [--calibration FILE…]
        --text FILE [--text FILE…] --json PATH [--model default] [--tokens 65536] [--epochs 8]
        [--learning-rate 1e-4]

Every merged stage is refitted in closed form. Then its maps are trained by AdamW, alone: from the
states of the model converted so far to the original's states behind it, ‖y - y*‖² / ‖y* - x‖², on
the calibration's windows, as often as `--epochs` says; the best epoch on one window in eight is
kept. Only the layers of one stage are in memory. Printed and written are the stage's errors before
and after, and what the whole model loses on each text, with stages trained and without.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import truedepth as td
import truedepth.calibration.run
from rows import losses, parser_of, report
from truedepth.calibration.refit import Calibrator, Refit
from truedepth.plan.plan import Plan
from truedepth.plan.stages import Segment
from truedepth.runtime.stage import LoadedSublayer, run_stage

HELD = 8  # one batch of so many is held out
WARMUP = 10  # steps


def plain(value: Any) -> Any:
    """A copy whose tensors autograd can use."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return type(value)(map(plain, value)) if isinstance(value, list | tuple) else value


class StageByStage(Calibrator):
    """A calibrator that trains every stage after it has refitted it."""

    epochs, learning_rate = 8, 1e-4
    errors: dict[str, tuple[float, float]]
    """By stage: the held-out error before and after training."""

    def refit(self, segment: Segment) -> Refit:
        """Refit a stage, train it, and take both models past it."""
        walk = self.walk
        with torch.inference_mode():
            walk.separate()
            walk.restart()
            before = walk.copied(walk.converted_states)
        found = super().refit(segment)
        with torch.inference_mode(False), torch.enable_grad():
            weights = {name: weight.clone() for name, weight in found.weights.items()}
            (stage,) = walk.loaded(segment, weights)
            trained = self._trained(stage, before)
        with torch.inference_mode():
            found.weights.update({name: weight.clone() for name, weight in trained.items()})
            (stage,) = walk.loaded(segment, found.weights)
            for windows, calls in walk.batches:
                x = walk.batch(before, windows)
                walk.converted_states[windows] = run_stage(x, stage, calls)
        return found

    def _trained(self, stage: list[LoadedSublayer], before: Tensor) -> dict[str, Tensor]:
        """The stage's maps from the best epoch, by name."""
        walk, family = self.walk, self._family
        maps = {
            self._named(each, name): each.layer.get_parameter(f"{name}.weight").requires_grad_()
            for each in stage
            for name in self._maps(each, (*family.reads, *family.writes))
        }
        batches = [(windows, plain(list(calls))) for windows, calls in walk.fitted]
        count = max(1, len(batches) // HELD)
        optimizer = torch.optim.AdamW(maps.values(), self.learning_rate, weight_decay=0.0)
        steps = max(1, self.epochs * (len(batches) - count))
        rate = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        )

        def error(windows: slice, calls: Any) -> Tensor:
            x, y = (walk.batch(s, windows).clone() for s in (before, walk.original_states))
            return (run_stage(x, stage, calls) - y).square().sum() / (y - x).square().sum()

        @torch.no_grad()
        def held() -> tuple[float, dict[str, Tensor]]:
            mean = sum(error(*batch).item() for batch in batches[-count:]) / count
            return mean, {name: weight.detach().clone() for name, weight in maps.items()}

        first = best = held()
        for _ in range(self.epochs):
            for batch in batches[:-count]:
                optimizer.zero_grad()
                torch.autograd.backward(error(*batch))
                optimizer.step()
                rate.step()
            best = min(best, held(), key=lambda each: each[0])
        name = " ".join(f"{each.kind[0].upper()}{each.index}" for each in stage)
        self.errors[name] = first[0], best[0]
        print(name, f"{first[0]:.5f} -> {best[0]:.5f}", flush=True)
        return best[1]


def main() -> None:
    """Convert with and without training, and measure both."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, action="append", required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=1 << 16)
    parser.add_argument("--epochs", type=int, default=StageByStage.epochs)
    parser.add_argument("--learning-rate", type=float, default=StageByStage.learning_rate)
    given = parser.parse_args()
    source, plan = td.open_source(given.model), Plan.from_yaml(given.plan)
    original = td.load(source, dtype=torch.float32)
    calibration = td.Calibration(text=given.calibration, tokens=given.tokens, dtype=torch.float32)
    StageByStage.epochs, StageByStage.learning_rate = given.epochs, given.learning_rate
    StageByStage.errors = {}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, calibrator in (("calibrated", Calibrator), ("trained", StageByStage)):
            start, out = time.monotonic(), Path(directory) / name
            with patch.object(truedepth.calibration.run, "Calibrator", calibrator):
                td.convert(source, out, plan, calibration=calibration)
            seconds = time.monotonic() - start
            loaded = td.load(out, dtype=torch.float32)
            result[name] = {"seconds": seconds, "losses": losses(loaded, original, given.text)}
    report(result | {"errors": StageByStage.errors}, given.json)


if __name__ == "__main__":
    main()
