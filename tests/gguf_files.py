"""GGUF files of small Llamas, written from their state dicts by hand."""

from __future__ import annotations

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from conftest import TINY


def interleave(matrix, heads):
    """llama.cpp's order of rotary rows, as its converter makes it from transformers'."""
    rows = matrix.reshape(heads, 2, -1, *matrix.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(matrix.shape))


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path, model, kind=gguf.GGMLQuantizationType.F32, rope_factors=None, skip=()):
    """A GGUF file of a small Llama, written from its state dict by hand."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    alphabet = gguf_alphabet()
    tokens = ["<end>", *alphabet, *[f"Ġ{c}" for c in alphabet]][: config.vocab_size]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(
        [f"Ġ {token[1:]}" for token in tokens if token[:1] == "Ġ" and token[1:]]
    )
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if ".q_proj." in name:
            values = interleave(values, config.num_attention_heads)
        elif ".k_proj." in name:
            values = interleave(values, config.num_key_value_heads)
        new = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }.get(name)
        if new is None:
            _, _, layer, rest = name.split(".", 3)
            module, part = rest.rsplit(".", 1)
            new = f"blk.{layer}.{GGUF_NAMES[module]}.{part}"
        if new in skip:
            continue
        if values.ndim > 1:
            writer.add_tensor(new, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new, values)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_alphabet():

    return sorted(pre_tokenizers.ByteLevel.alphabet())


GGUF_TINY = TINY | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
