"""The default model with a quarter less all-reduces: a searched plan, calibrated, measured."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from truedepth.calibration.options import Calibration
from truedepth.conversion import Conversion, convert
from truedepth.evaluation.generation import Generation, generation
from truedepth.evaluation.perplexity import Perplexity, perplexity
from truedepth.plan.plan import Plan
from truedepth.progress import working
from truedepth.runtime.device import default_device, device_of
from truedepth.runtime.generation import answer
from truedepth.runtime.loading import load
from truedepth.sources.opening import open_source
from truedepth.speed.benchmark import bench
from truedepth.speed.ranks import possible_ranks
from truedepth.speed.timing import Row, Task

# 60 -> 46 all-reduces, as many as the paper's 7 pairs save, by `truedepth plan default
# --all-reduces 46` (docs/results.md)
PLAN = Path(__file__).with_name("demo_plan.yaml")
TOKENS = 1 << 14  # for calibration; sampled from the model, so that the measured text stays unseen
WINDOWS = 16
CONTEXT = 32  # tokens in the KV cache when decoding is timed
REPETITIONS = 11
ANSWER = 64  # tokens of an answer
ANSWERED = 40  # prompts at once
PROMPT = "Why is the sky blue? Answer in two sentences."


@dataclass(frozen=True)
class Demo:
    """What `run_demo` measured."""

    conversion: Conversion
    perplexity: Perplexity
    speed: Row
    ranks: int
    """Tensor-parallel ranks of the timing."""

    prompt: str
    answer_before: str
    answer_after: str
    device: str
    kept: bool
    """Whether the converted checkpoint was kept."""

    generation: Generation
    """What both write in answer to the prompts that come with the package."""

    def to_dict(self) -> dict[str, Any]:
        """All results as JSON-compatible data."""
        return asdict(self) | {
            "conversion": self.conversion.to_dict(),
            "perplexity": self.perplexity.to_dict(),
            "generation": self.generation.to_dict(),
            "speed": self.speed.to_dict(),
        }


def run_demo(
    out: Path | None = None,
    *,
    force: bool = False,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Demo:
    """Convert the default model by a stored plan, calibrate it, and compare it with the original.

    Args:
        out: Directory for the checkpoint; default: it is deleted afterwards.
        force: Replace `out` if it exists.
        device: Device of both models; default: the first GPU, else the CPU.
        dtype: Dtype of both models when they are measured; default: as in `load`.

    Raises:
        TruedepthError: `out` exists without `force`, or a step fails.
    """
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory, original = out or scratch / "converted", scratch / "original"
        source = open_source("default")
        options = Calibration(tokens=TOKENS, own_text=1.0, check=0, device=device)
        plan, ranks = Plan.from_yaml(PLAN), possible_ranks(2, device_of(device))
        conversion = convert(
            source, directory, plan, calibration=options, pad_heads=ranks, force=force
        )
        with working("Loading both models"):
            before = load(source, device=device, dtype=dtype)
            after = load(directory, device=device, dtype=dtype)
        measured = perplexity(after, against=before, windows=WINDOWS)
        written = generation(after, against=before, max_new_tokens=ANSWER, batch_size=ANSWERED)
        with working("Answering"):
            answers = [answer(each, PROMPT, max_new_tokens=ANSWER).text for each in (before, after)]
        del before, after
        convert(source, original, plan.unpaired, pad_heads=ranks)
        (speed,) = bench(
            directory,
            against=original,
            tasks=[Task.decode],
            lengths=[CONTEXT],
            ranks=ranks,
            fuse=True,
            repetitions=REPETITIONS,
            device=device,
            dtype=dtype,
        ).rows
        return Demo(
            conversion=conversion,
            perplexity=measured,
            speed=speed,
            ranks=ranks,
            prompt=PROMPT,
            answer_before=answers[0],
            answer_after=answers[1],
            device=str(device or default_device()),
            kept=out is not None,
            generation=written,
        )
