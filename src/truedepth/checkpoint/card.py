"""The README.md of a converted checkpoint."""

from __future__ import annotations

from truedepth.checkpoint.records import CalibrationRecord, HealingRecord
from truedepth.plan.plan import Plan
from truedepth.sources.source import Source
from truedepth.version import __version__

TRAINED = {
    "paired": "the wide layers were",
    "all": "all weights were",
    "lora": "low-rank additions to the wide layers were",
}


def model_card(
    source: Source,
    plan: Plan,
    all_reduces: int,
    calibration: CalibrationRecord | None,
    healing: HealingRecord | None = None,
) -> str:
    """Markdown with the metadata that model hubs read.

    Args:
        source: The original.
        plan: Of the checkpoint.
        all_reduces: Per token over several ranks, of the layers as engines run them.
        calibration: If it was calibrated.
        healing: If it was healed.
    """
    base = f"base_model: {source.name}\n" if "/" in source.name else ""
    quantized = ""
    if source.quantization:
        quantized = f"\nThe source's weights were dequantized once from {source.quantization}.\n"
    repaired = ""
    if calibration:
        repaired = (
            f"\nThe wide layers were refitted to the original in closed form, on {calibration}.\n"
        )
        if check := calibration.check:
            repaired += (
                f"On {check.tokens:,} other tokens of that text the loss is"
                f" {check.excess:.4f} nats a token above the original's.\n"
            )
    if healing:
        tokens = sum(healing.text.values())
        loss = healing.validation.after
        repaired += (
            f"\nThen {TRAINED[healing.train]} trained toward the original on {tokens:,} tokens"
            f" of {', '.join(healing.text)}.\nOn tokens of that text that were not"
            f" trained on the loss is {loss['excess']:.4f} nats a token above the original's, KL"
            f" {loss['kl']:.4f}.\n"
        )
    without = "" if healing else " without training"
    before = plan.unpaired.all_reduces
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags: [truedepth, layer-parallelism]
---

# {source.name.rpartition("/")[2]}, {plan.num_layers} layers at depth {plan.effective_depth}

{source.name} with {plan.paired_layers} of its {plan.num_layers} layers running side by side
(Layer Parallelism, arXiv 2502.02790), made by truedepth {__version__}{without}.

    {plan}

| | original | this model |
|---|---|---|
| layers, one after another | {plan.num_layers} | {plan.effective_depth} |
| all-reduces a token under tensor parallelism | {before} | {all_reduces} |

The number of weights is the original's, and so is the size of the KV cache. The output is not: what
pairing costs is measured by `truedepth eval THIS --against ORIGINAL`.
{repaired}{quantized}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS", trust_remote_code=True)
```

`trust_remote_code` is not needed after `import truedepth`. The licence is that of the original.
"""
