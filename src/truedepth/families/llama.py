"""Llama 1 to 3.3, and everything else with `model_type: llama` (SmolLM2, TinyLlama, …)."""

from truedepth.families.family import KEY_VALUE, QUERY, Family

LLAMA = Family(
    model_type="llama",
    class_prefix="Llama",
    reads=(
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ),
    writes=("self_attn.o_proj", "mlp.down_proj"),
    heads={
        "self_attn.q_proj": QUERY,
        "self_attn.k_proj": KEY_VALUE,
        "self_attn.v_proj": KEY_VALUE,
        "self_attn.o_proj": QUERY,
    },
    obsolete=("self_attn.rotary_emb.inv_freq",),
)

FAMILIES = (LLAMA,)
