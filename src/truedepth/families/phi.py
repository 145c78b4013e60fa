"""Phi-3 and Phi-4: Llama's layers with q, k and v in one map, gate and up in another."""

from truedepth.families.family import FFN, KEY_VALUE, QUERY, Family

PHI3 = Family(
    model_type="phi3",
    class_prefix="Phi3",
    reads=("self_attn.qkv_proj", "mlp.gate_up_proj"),
    writes=("self_attn.o_proj", "mlp.down_proj"),
    packed={
        "self_attn.qkv_proj": (QUERY, KEY_VALUE, KEY_VALUE),
        "mlp.gate_up_proj": (FFN, FFN),
    },
    heads={},
)

FAMILIES = (PHI3,)
