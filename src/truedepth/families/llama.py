"""Llama 1 to 3.3, and everything else with `model_type: llama` (SmolLM2, TinyLlama, …)."""

from truedepth.families import Family

LLAMA = Family(
    model_type="llama",
    class_prefix="Llama",
    reads={
        "self_attn.q_proj": "input_layernorm",
        "self_attn.k_proj": "input_layernorm",
        "self_attn.v_proj": "input_layernorm",
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
    },
    writes=("self_attn.o_proj", "mlp.down_proj"),
    heads={
        "self_attn.q_proj": "num_attention_heads",
        "self_attn.k_proj": "num_key_value_heads",
        "self_attn.v_proj": "num_key_value_heads",
        "self_attn.o_proj": "num_attention_heads",
    },
    obsolete=("self_attn.rotary_emb.inv_freq",),
)
