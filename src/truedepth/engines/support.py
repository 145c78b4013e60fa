"""Which serving engines run which truedepth checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from truedepth.modeling import GATHERED, styles_of

VLLM_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma", "cohere")
"""Families for which the plugin gives vLLM's model classes layers of different widths."""

VLLM_STAGES = (
    *("gemma2", "gemma3_text", "glm4"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
    *("olmo2", "olmo3", "seed_oss", "smollm3", "starcoder2"),
)
"""Families whose classes in vLLM run stages of sub-layers, by tests; others may."""

LLAMA_CPP_FAMILIES = ("llama", "mistral", "qwen2")
"""Families whose layers llama.cpp's architecture `deci` computes."""


def shares_queries(config: Any) -> bool:
    """Whether ranks share their queries, as norms over the heads of all ranks need.

    In rank-local stages these come from different states, so vLLM does not run those.

    Args:
        config: The model's, or the class of it.
    """
    styles = styles_of(config).items()
    return any(name.endswith(".q_proj") and style in GATHERED for name, style in styles)


def refused_by(
    family: str,
    side_by_side: bool,
    stages: bool = False,
    wide: bool = False,
    inside: bool = False,
    local: bool = False,
) -> dict[str, str]:
    """Say for every engine why it does not run a model; the reason is empty if it does.

    Args:
        family: `model_type` of the original.
        side_by_side: Whether some groups of the model are not wide layers.
        stages: Whether some of its sub-layers share a stage.
        wide: Whether some of its layers are wide.
        inside: Whether it is inside a model that takes other input than text.
        local: Whether some of its stages are rank-local.
    """
    if inside:
        reason = "not inside a model that takes other input than text"
        return {"transformers": "", "vLLM": reason, "llama.cpp": reason}
    reasons = {"transformers": ""}
    for engine, families in (("vLLM", VLLM_FAMILIES), ("llama.cpp", LLAMA_CPP_FAMILIES)):
        reason = "" if family in families else "not for this family"
        if engine == "vLLM" and family in VLLM_STAGES:
            plain = stages and not side_by_side and not wide
            reason = "" if plain else "stages of sub-layers alone"
        elif side_by_side and not reason:
            reason = "not with layers side by side"
        if stages and not reason and engine != "vLLM":
            reason = "not with stages of sub-layers"
        if local and not reason and shares_queries(CONFIG_MAPPING[family]):
            reason = "not with rank-local stages"
        reasons[engine] = reason
    return reasons
