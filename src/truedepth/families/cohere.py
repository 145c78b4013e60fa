"""Cohere (Command R): attention and FFN already run side by side, after one norm. In Cohere 2 some
layers attend locally, and the others have no RoPE.
"""

from dataclasses import replace

from truedepth.families.family import KEY_VALUE, QUERY, SublayerNames
from truedepth.families.llama import LLAMA

COHERE = replace(
    LLAMA,
    model_type="cohere",
    class_prefix="Cohere",
    ffn=SublayerNames("mlp", "input_layernorm"),
    parallel=True,
    head_norms={"self_attn.q_norm": QUERY, "self_attn.k_norm": KEY_VALUE},
)
COHERE2 = replace(COHERE, model_type="cohere2", class_prefix="Cohere2", head_norms={})

FAMILIES = (COHERE, COHERE2)
