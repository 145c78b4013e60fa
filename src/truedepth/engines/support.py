"""Serving engines that run truedepth checkpoints."""

from __future__ import annotations

VLLM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "cohere")
"""Whose classes of vLLM's the plugin gives layers of other widths."""

LLAMA_CPP_FAMILIES = ("llama", "mistral", "qwen2")
"""Whose layers llama.cpp's architecture `deci` computes."""


def refused_by(family: str, branches: bool) -> dict[str, str]:
    """By engine, why it does not run a model; an engine that does has an empty reason.

    Args:
        family: `model_type` of the original.
        branches: Whether some of its groups are branch groups.
    """
    reasons = {"transformers": ""}
    for engine, families in (("vLLM", VLLM_FAMILIES), ("llama.cpp", LLAMA_CPP_FAMILIES)):
        reason = "" if family in families else "not this family"
        if branches and not reason:
            reason = "no branch groups"
        reasons[engine] = reason
    return reasons
