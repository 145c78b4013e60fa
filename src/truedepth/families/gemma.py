"""Gemma: Llama's layers with norms that add 1 to their weights. Gemma 2 and 3 also have norms after
attention and FFN, and some of their layers attend locally.
"""

from dataclasses import replace

from truedepth.families.family import SublayerNames
from truedepth.families.llama import LLAMA

GEMMA = replace(LLAMA, model_type="gemma", class_prefix="Gemma", gain_offset=1.0)
GEMMA2 = replace(
    GEMMA,
    model_type="gemma2",
    class_prefix="Gemma2",
    attention=SublayerNames("self_attn", "input_layernorm", "post_attention_layernorm"),
    ffn=SublayerNames("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    side_by_side_only="each has a norm after its attention and FFN",
)
GEMMA3 = replace(GEMMA2, model_type="gemma3_text", class_prefix="Gemma3", body_prefix="Gemma3Text")

FAMILIES = (GEMMA, GEMMA2, GEMMA3)
