"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values. Qwen3: norms over each
query and key head instead of the biases.
"""

from dataclasses import replace

from truedepth.families.family import KEY_VALUE, QUERY
from truedepth.families.llama import LLAMA

QWEN2 = replace(LLAMA, model_type="qwen2", class_prefix="Qwen2")
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    class_prefix="Qwen3",
    head_norms={"self_attn.q_norm": QUERY, "self_attn.k_norm": KEY_VALUE},
)

FAMILIES = (QWEN2, QWEN3)
