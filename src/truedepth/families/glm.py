"""GLM: Llama's layers with gate and up in one map. GLM-4 also has norms after both sublayers."""

from dataclasses import replace

from truedepth.families.family import FFN, SublayerNames
from truedepth.families.llama import LLAMA

GLM = replace(
    LLAMA,
    model_type="glm",
    class_prefix="Glm",
    reads=(*LLAMA.reads[:3], "mlp.gate_up_proj"),
    packed={"mlp.gate_up_proj": (FFN, FFN)},
)
GLM4 = replace(
    GLM,
    model_type="glm4",
    class_prefix="Glm4",
    attention=SublayerNames("self_attn", "input_layernorm", "post_self_attn_layernorm"),
    ffn=SublayerNames("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
    side_by_side_only="each has a norm after its attention and FFN",
)

FAMILIES = (GLM, GLM4)
