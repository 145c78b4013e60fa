"""The model card: README.md of a converted checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from truedepth.checkpoint.records import CalibrationRecord, HealingRecord
from truedepth.errors import TruedepthError
from truedepth.plan.config import plan_of
from truedepth.plan.plan import Plan
from truedepth.sources.source import Source
from truedepth.version import __version__

TRAINED = {
    "paired": "{} were",
    "all": "all weights were",
    "lora": "low-rank additions to {} were",
}

MEASURED = "## Measured"
"""The heading of what `truedepth eval --card` adds."""

TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
"""The hub's name for what a model does, by the auto class that loads it."""


def model_card(
    source: Source,
    plan: Plan,
    all_reduces: int,
    calibration: CalibrationRecord | None,
    healing: HealingRecord | None = None,
) -> str:
    """The card's Markdown, with the metadata that model hubs read.

    Args:
        source: The original.
        plan: The checkpoint's plan.
        all_reduces: All-reduces per token over several ranks, as engines run the layers.
        calibration: The record of the calibration, if there was one.
        healing: The record of the healing, if there was one.
    """
    base = f"base_model: {source.name}\n" if "/" in source.name else ""
    quantized = ""
    if source.quantization:
        quantized = f"\nThe source's weights were dequantized once from {source.quantization}.\n"
    repaired, together = "", _together(plan)
    if calibration:
        repaired = (
            f"\n{together[0].upper()}{together[1:]} were refitted to the original in closed form,"
            f" on {calibration}.\n"
        )
        if check := calibration.check:
            repaired += (
                f"On {check.tokens:,} other tokens of that text the loss is"
                f" {check.excess:.4f} nats per token above the original's.\n"
            )
    if healing:
        tokens = sum(healing.text.values())
        loss = healing.validation.after
        repaired += (
            f"\nThen {TRAINED[healing.train].format(together)} trained toward the original on"
            f" {tokens:,} tokens of {', '.join(healing.text)}.\nOn tokens of that text that it was"
            f" not trained on, the loss is {loss['excess']:.4f} nats per token above the"
            f" original's, the KL divergence from the original {healing.at_least}{loss['kl']:.4f}"
            " nats per token.\n"
        )
    outer = source.outer
    auto = outer.auto_class if outer else "AutoModelForCausalLM"
    reader = "AutoProcessor" if outer else "AutoTokenizer"
    task = TASKS[auto]
    without = "" if healing else " without training"
    ranks, simulate = _ranks(plan)
    before = plan.unpaired.all_reduces
    return f"""---
{base}library_name: transformers
pipeline_tag: {task}
tags: [truedepth, layer-parallelism]
---

# {source.name.rpartition("/")[2]}, {plan.num_layers} layers at depth {plan.effective_depth}

{source.name} {_what_runs_together(plan)},
made by truedepth {__version__}{without}.

    {plan}

| | original | this model |
|---|---|---|
| sequential layers (effective depth) | {plan.num_layers} | {plan.effective_depth} |
| all-reduces per token under tensor parallelism | {before} | {all_reduces} |

The number of weights and the size of the KV cache are the original's. The output is not:
`truedepth eval THIS --against ORIGINAL` measures what that costs.
{repaired}{quantized}{ranks}
```python
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("THIS", trust_remote_code=True{simulate})
{reader[4:].lower()} = {reader}.from_pretrained("THIS", trust_remote_code=False)
```

`trust_remote_code` is not needed after `import truedepth`. The {reader[4:].lower()} has no code;
without the argument, transformers 5 asks about the model's. The licence is the original's.
"""


def card_of(source: Source) -> Path:
    """The model card's file in a checkpoint that truedepth has made.

    Raises:
        TruedepthError: There is none.
    """
    path = source.path / "README.md"
    if plan_of(source.config) is None or not path.is_file():
        raise TruedepthError(
            f"{source.path} is not a checkpoint with a model card that truedepth has written, which"
            " the figures could go to."
        )
    return path


def with_figures(card: str, title: str, figures: str) -> str:
    """A card with measured figures under a title, instead of those that it had there.

    Args:
        card: The card.
        title: What was measured.
        figures: Markdown.
    """
    if MEASURED not in card:
        card = f"{card.rstrip()}\n\n{MEASURED}\n"
    heading = f"### {title}\n"
    before, found, behind = card.partition(heading)
    if found:
        others = re.split(r"^(?=##)", behind, maxsplit=1, flags=re.MULTILINE)[1:]
        return "\n".join([f"{before}{heading}", f"{figures}\n", *others])
    return f"{card.rstrip()}\n\n{heading}\n{figures}\n"


def _ranks(plan: Plan) -> tuple[str, str]:
    """What is said of the ranks of local stages, and the option of one process in their place."""
    if plan.ranks is None:
        return "", ""
    said = (
        f"\nIts local stages are for {plan.ranks} tensor-parallel ranks: over as many it is loaded"
        f" with `distributed_config=DistributedConfig(tp_size={plan.ranks})`, or served by vLLM"
        f" with `--tensor-parallel-size {plan.ranks}`, and over any other number it is refused. One"
        " process can compute what they would:\n"
    )
    return said, ", simulate_ranks=True"


def _together(plan: Plan) -> str:
    """What runs together, as calibration and healing change it."""
    if not plan.merged:
        return "the wide layers"
    wide = "the wide layers and " if plan.paired_layers else ""
    return f"{wide}the sub-layers that share a stage"


def _what_runs_together(plan: Plan) -> str:
    parts = []
    if plan.paired_layers or not plan.merged:
        parts.append(
            f"with {plan.paired_layers} of its {plan.num_layers} layers running side by side\n"
            "(Layer Parallelism, arXiv 2502.02790)"
        )
    if plan.merged:
        parts.append(
            f"with {len(plan.merged)} stage{'s' * (len(plan.merged) > 1)} in which sub-layers (A:"
            " attention, F: FFN) read one state"
            + ", or (|) what their tensor-parallel rank has"
            * (plan.ranks is not None)
        )
    return ", and\n".join(parts)
