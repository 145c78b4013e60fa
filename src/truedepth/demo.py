"""The default model at the paper's dose: a searched plan, calibrated and measured."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from truedepth.calibration.options import Calibration
from truedepth.conversion import Conversion, convert
from truedepth.evaluation.perplexity import Perplexity, perplexity
from truedepth.plan.plan import Plan
from truedepth.progress import working
from truedepth.runtime.device import default_device
from truedepth.runtime.generation import answer
from truedepth.runtime.loading import load
from truedepth.sources.opening import open_source
from truedepth.speed.timing import Case, Row, Task, interleaved
from truedepth.speed.transformers import TransformersRunner

# 30 -> 23 layers, the paper's -22 % of depth; made by
# truedepth plan default -o demo_plan.yaml --depth 23 (minutes; docs/results.md has the options)
PLAN = Path(__file__).with_name("demo_plan.yaml")
TOKENS = 1 << 14  # to calibrate on, all the model's own: the text that is measured on stays unseen
WINDOWS = 16
DECODING = Case(Task.decode, length=32)
PROMPT = "Why is the sky blue? Answer in two sentences."


@dataclass(frozen=True)
class Demo:
    """What `truedepth demo` prints."""

    conversion: Conversion
    perplexity: Perplexity
    speed: Row
    prompt: str
    answer_before: str
    answer_after: str
    device: str
    kept: bool
    """Whether the converted checkpoint is still there."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {
            "conversion": self.conversion.to_dict(),
            "perplexity": self.perplexity.to_dict(),
            "speed": self.speed.to_dict(),
        }


def run_demo(
    out: Path | None = None,
    *,
    force: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Demo:
    """Convert the default model by a plan searched before, calibrate it, and compare the two.

    Args:
        out: Where the checkpoint is kept; by default it is thrown away.
        force: Replace `out` if it exists.
        device: To run on.
        dtype: To run in.
    """
    with contextlib.ExitStack() as stack:
        directory = out or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "converted"
        source = open_source("default")
        options = Calibration(tokens=TOKENS, own_text=1.0, check=0, device=device)
        plan = Plan.from_yaml(PLAN)
        conversion = convert(source, directory, plan, calibration=options, force=force)
        with working("Loading both models"):
            before = load(source, device=device, dtype=dtype)
            after = load(directory, device=device, dtype=dtype)
        measured = perplexity(after, against=before, windows=WINDOWS)
        with working("Decoding"):
            ours, theirs = (TransformersRunner(each.model) for each in (after, before))
            (speed,) = interleaved(ours, theirs, [DECODING], repetitions=11)
            answers = [answer(each, PROMPT, max_new_tokens=64).text for each in (before, after)]
        return Demo(
            conversion=conversion,
            perplexity=measured,
            speed=speed,
            prompt=PROMPT,
            answer_before=answers[0],
            answer_after=answers[1],
            device=str(device or default_device()),
            kept=out is not None,
        )
