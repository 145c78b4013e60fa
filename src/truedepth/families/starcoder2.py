"""StarCoder2: LayerNorm and biases everywhere, and an FFN without a gate."""

from dataclasses import replace

from truedepth.families.llama import LLAMA

STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    class_prefix="Starcoder2",
    reads=(*LLAMA.reads[:3], "mlp.c_fc"),
    writes=("self_attn.o_proj", "mlp.c_proj"),
)

FAMILIES = (STARCODER2,)
