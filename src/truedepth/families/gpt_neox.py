"""GPT-NeoX (Pythia): in most models attention and FFN run side by side, each after its LayerNorm.

transformers computes this family's head size from the number of heads, so a layer cannot have more.
"""

from truedepth.families.family import Family, SublayerNames

GPT_NEOX = Family(
    model_type="gpt_neox",
    class_prefix="GPTNeoX",
    attention=SublayerNames("attention", "input_layernorm"),
    reads=("attention.query_key_value", "mlp.dense_h_to_4h"),
    writes=("attention.dense", "mlp.dense_4h_to_h"),
    heads={},
    parallel="use_parallel_residual",
    side_by_side_only="transformers' layer of this family cannot have more heads than the model",
    obsolete=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    layer="gpt_neox.layers.{}.",
    outside=("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "lm_head"),
    renamed={"embed_out.": "lm_head."},
)

FAMILIES = (GPT_NEOX,)
