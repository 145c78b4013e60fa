"""A small random model with the structure of a given one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from truedepth.errors import TruedepthError, reason_of

MOST_PARAMETERS = 20_000_000
"""A model that is not small by then has sizes that `SMALL` does not know."""

SMALL = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 64),
    **dict.fromkeys(("hidden_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_attention_heads", "num_local_experts", "num_experts"), 4),
    **dict.fromkeys(("n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "sliding_window", "attention_chunk_size"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),  # texts are padded to whole chunks
    "q_lora_rank": 16,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
"""Sizes of the small model, by their keys in config.json."""


def small_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the same structure, with small sizes.

    Args:
        config: The contents of config.json.
    """
    small = {key: _small(key, value) for key, value in config.items()}
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(kv_heads, int):
        small["num_key_value_heads"] = 4 if kv_heads == heads else 2
    for key in ("quantization_config", "auto_map", "dtype", "torch_dtype", "architectures"):
        small.pop(key, None)
    return small


def _small(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        if "rope_type" in value or "type" in value:  # scaling has lists of factors by dimension
            kept = {k: v for k, v in value.items() if isinstance(v, int | float)}
            return {"rope_theta": 10000.0} | kept | {"rope_type": "default"}
        return {k: _small(k, v) for k, v in value.items()}
    if key == "rope_scaling":
        return None
    if isinstance(value, list) and key in SMALL:
        return [_small(key, each) for each in value]
    usable = isinstance(value, int) and not isinstance(value, bool)
    return SMALL[key] if key in SMALL and usable else value


def random_model(config: Mapping[str, Any]) -> Any:
    """A model of transformers with random weights, float32.

    Args:
        config: As `small_config` gives it.

    Raises:
        TruedepthError: transformers cannot build it, or it is not small or no list of layers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(device: str) -> Any:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**copy.deepcopy(dict(config))),
                dtype=torch.float32,
                attn_implementation="eager",
            )

    try:
        empty = build("meta")
        layers_of(empty)
        size = sum(parameter.numel() for parameter in empty.parameters())
        if size > MOST_PARAMETERS:
            raise TruedepthError(f"a small model of its kind has {size / 1e6:,.0f} M parameters")
        model = build("cpu")
    except TruedepthError:
        raise
    except Exception as error:  # model classes raise exceptions of any type
        raise TruedepthError(
            f"transformers cannot build a small model of its kind: {reason_of(error)}"
        ) from error
    with torch.no_grad():
        for parameter in model.parameters():
            # norms must differ, and nothing may be 0, as what is added would be
            parameter.normal_(1.0, 0.1) if parameter.ndim == 1 else parameter.normal_(0.0, 0.2)
    return model.eval()


def layers_of(model: Any) -> nn.ModuleList:
    """A model's decoder layers; raises TruedepthError if they are not where they usually are."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.num_hidden_layers:
        raise TruedepthError("its decoder layers are not in a list `layers` of its base model")
    return layers
