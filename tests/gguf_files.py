"""GGUF files of small Llamas, written from their state dicts by hand, and what can be exported."""

from __future__ import annotations

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import MistralConfig, PreTrainedTokenizerFast, Qwen2Config

import truedepth as td
from gguf_vocabularies import add_fields
from tiny_models import TINY
from truedepth.sources.gguf.words import GPT2, WORDS, published


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


def write_gguf(
    path, model, kind=gguf.GGMLQuantizationType.F32, rope_factors=None, skip=(), fields=None
):
    """A GGUF file of a small Llama, written from its state dict by hand.

    `fields` are the metadata of its tokenizer; by default it has one that splits as SmolLM's.
    """
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
    add_fields(writer, fields or smollm(config.vocab_size))
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


def smollm(tokens):
    """Metadata of a tokenizer of `tokens` tokens: an end, bytes, bytes after a space."""
    alphabet = gguf_alphabet()
    names = ["<end>", *alphabet, *[f"Ġ{byte}" for byte in alphabet]][:tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3] + [1] * (len(names) - 1),
        "tokenizer.ggml.merges": [f"Ġ {name[1:]}" for name in names if name[:1] == "Ġ" != name],
        "tokenizer.ggml.eos_token_id": 0,
    }


def gguf_alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


GGUF_TINY = TINY | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
PAIRS = [[2, 3], [4, 5]]
MODELS = {
    "unpaired": ({}, []),
    "mixed widths": ({}, [[1, 2, 3], [4, 5]]),
    "first layer in a group": ({}, [[0, 1]]),
    "all layers in groups": ({}, [[0, 1], [2, 3], [4, 5]]),
    "biases": ({"attention_bias": True, "mlp_bias": True}, PAIRS),
    "tied": ({"tie_word_embeddings": True}, PAIRS),
    "head_dim": ({"head_dim": 32}, PAIRS),
    "padded heads": ({"num_key_value_heads": 1}, PAIRS, {"pad_heads": 2}),
    "Llama 3": ({"rope_parameters": LLAMA3}, PAIRS),
    "Mistral": ({"family": MistralConfig, "sliding_window": None}, PAIRS),
    "Qwen2": ({"family": Qwen2Config}, PAIRS),
}


def converted(make_model, directory, options, groups, more=None):
    """A checkpoint of a random model, whose name is `out`."""
    td.convert(make_model(**options), directory / "out", td.Plan(6, groups), **more or {})
    return directory / "out"


MERGES = (
    *("1 2", "12 3", "123 4", "' l", "'l l", "Ċ Ċ", "! Ċ", "Ġ Ġ", "l C", "Ġ 1", "t h", "th e"),
    *("Ġ the", "e Ġ", "l l", "a t", "z zz", "z z"),
)
"""Most across places where one way of splitting into words splits and another does not."""


PUBLISHED = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken")
"""Ways of splitting of which published tokenizers are exported."""


def with_words(name, patterns=None):
    """A byte-level tokenizer that splits text as a published one that llama.cpp calls `name`."""
    patterns = patterns or published(name)
    vocabulary = {token: index for index, token in enumerate(["<end>", *gguf_alphabet()])}
    merges = [tuple(merge.split()) for merge in MERGES]
    for left, right in merges:
        vocabulary.setdefault(left, len(vocabulary))
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=WORDS[name].whole))
    gpt2 = patterns[-1] == GPT2
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == r"\p{N}"
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in (patterns[:-1] if gpt2 else patterns)
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def sentencepiece():
    """A tokenizer as Llama 2 and Mistral have it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = [("h", "e"), ("t", "he"), ("▁", "the"), ("c", "a"), ("▁", "ca"), ("▁ca", "t")]
    for piece in [*"▁thecas", *("".join(pair) for pair in merges)]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
