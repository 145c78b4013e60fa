"""OLMo 2 and 3: norms behind attention and FFN, not before them, and over all queries and keys."""

from dataclasses import replace

from truedepth.families.family import SublayerNames
from truedepth.families.llama import LLAMA

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    class_prefix="Olmo2",
    attention=SublayerNames("self_attn", None, "post_attention_layernorm"),
    ffn=SublayerNames("mlp", None, "post_feedforward_layernorm"),
    heads={},  # the norms are over all of them
    side_by_side_only="each has a norm behind its attention and FFN",
)
OLMO3 = replace(OLMO2, model_type="olmo3", class_prefix="Olmo3")

FAMILIES = (OLMO2, OLMO3)
