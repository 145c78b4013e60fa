"""Small models of decoder architectures that no file of `truedepth.families` describes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny_models import TINY

EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "intermediate_size_mlp": 96,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
FIRST_DENSE = {"first_k_dense_replace": 2}
"""The first two layers have no experts."""

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"decoder_sparse_step": 2},
    "qwen3_moe": {"head_dim": 16},
    "olmoe": {},
    "gpt_oss": {"head_dim": 16, "sliding_window": 8},
    "deepseek_v2": {**LATENT, **FIRST_DENSE, "topk_method": "greedy", "num_experts_per_tok": 2},
    "deepseek_v3": {**LATENT, **FIRST_DENSE},
    "glm4_moe": {"head_dim": 16, **FIRST_DENSE},
    "phimoe": {},
}
"""Those that are named in docs/families.md, and what their configs need."""

OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("afmoe", "apertus", "aria_text", "bitnet", "diffllama", "ernie4_5")),
    **dict.fromkeys(("ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "helium")),
    **dict.fromkeys(("granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared", "hy_v3")),
    **dict.fromkeys(("hyperclovax", "jais2", "minimax_m2", "minimax_m3_vl_text")),
    **dict.fromkeys(("olmo", "persimmon", "seed_oss", "stablelm", "vaultgemma")),
    **dict.fromkeys(("axk1", "deepseek_v32", "minicpm3", "youtu"), LATENT),
    "cwm": {"bos_token_id": 1},
    "nemotron": {"num_key_value_heads": 2},
}
ARCHITECTURES = {name: own or {} for name, own in (MIXTURES | OTHERS).items()}


WHOLE = {
    **dict.fromkeys(("deepseek_v3", "flint", "granitemoe", "granitemoeshared"), 2),
    **dict.fromkeys(("phimoe", "youtu"), 2),
    "afmoe": 3,  # the FFNs of its first layers, too
    "axk1": -4,  # its experts are normed inside its FFNs, which keep their own all-reduces
}
"""How many of the stages A0 F0 A1, F1, A2, F2 A3, F3, A4, F4 A5 F5 consist of what every rank has
whole, such as an attention."""
if not any("experts" in name for name in CONFIG_MAPPING["qwen2_moe"].base_model_tp_plan):
    WHOLE["qwen2_moe"] = 2  # transformers 5.16 to 5.19 give every rank all experts


def config_of(architecture: str) -> Any:
    """A config of 6 small layers."""
    usual = CONFIG_MAPPING[architecture]()
    sizes = TINY | EXPERTS | {"head_dim": 16, "sliding_window": 8, "rope_scaling": None}
    own = {key: value for key, value in sizes.items() if getattr(usual, key, None) is not None}
    if "qk_rope_head_dim" in (given := ARCHITECTURES[architecture]):
        own.pop("head_dim", None)
    # configs write into the dictionaries that they are given
    own = copy.deepcopy({**own, "num_hidden_layers": 6, **given})
    return CONFIG_MAPPING[architecture](**own)


def plan_of_ranks(architecture: str) -> dict[str, str]:
    """How this release of transformers shards its layers; that differs between releases."""
    plan = CONFIG_MAPPING[architecture].base_model_tp_plan or {}
    return {name: style for name, style in plan.items() if name.startswith("layers.")}


def is_sharded(architecture: str) -> bool:
    """Whether several ranks share its layers, rather than hold them whole."""
    return bool(plan_of_ranks(architecture))


def _keeps_experts_whole(architecture: str) -> bool:
    counts = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    if architecture not in CONFIG_MAPPING:
        return False
    is_mixture = any(getattr(config_of(architecture), count, None) for count in counts)
    return is_mixture and not any("experts" in name for name in plan_of_ranks(architecture))


NOT_LOCAL = dict.fromkeys(
    ("axk1", *filter(_keeps_experts_whole, ARCHITECTURES)),
    "mlp cannot be in a stage that is local to 2 ranks",
)
"""This release of transformers shards no experts of them; axk1 norms the sum of its experts."""


def model_of(architecture: str) -> Any:
    """A random model whose sub-layers all matter, in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(architecture), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.1) if parameter.ndim == 1 else parameter.normal_(0.0, 0.2)
    return model.eval()
