"""Serving engines that run truedepth checkpoints."""

from __future__ import annotations

VLLM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "cohere")
"""Whose classes of vLLM's the plugin gives layers of other widths."""

LLAMA_CPP_FAMILIES = ("llama", "mistral", "qwen2")
"""Whose layers llama.cpp's architecture `deci` computes."""


def refused_by(family: str, side_by_side: bool) -> dict[str, str]:
    """By engine, why it does not run a model; an engine that does has an empty reason.

    Args:
        family: `model_type` of the original.
        side_by_side: Whether some of its groups are not wide layers.
    """
    reasons = {"transformers": ""}
    for engine, families in (("vLLM", VLLM_FAMILIES), ("llama.cpp", LLAMA_CPP_FAMILIES)):
        reason = "" if family in families else "not this family"
        if side_by_side and not reason:
            reason = "no layers side by side, only wide layers"
        reasons[engine] = reason
    return reasons
