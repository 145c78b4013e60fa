"""OLMo 2 and 3: norms after attention and FFN instead of before; norms over all queries or keys."""

from dataclasses import replace

from truedepth.families.family import SublayerNames
from truedepth.families.llama import LLAMA

OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    class_prefix="Olmo2",
    attention=SublayerNames("self_attn", None, "post_attention_layernorm"),
    ffn=SublayerNames("mlp", None, "post_feedforward_layernorm"),
    heads={},  # q and k norms span all heads, so padding would change them
    side_by_side_only="each has a norm after its attention and FFN",
)
OLMO3 = replace(OLMO2, model_type="olmo3", class_prefix="Olmo3")

FAMILIES = (OLMO2, OLMO3)
