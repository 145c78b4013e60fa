"""A GGUF file as a source: tensors under transformers' names, dequantized as they are read.

All of it is read here: transformers (5.23) fills what a file does not say with its own defaults,
drops Llama 3's RoPE scaling, reads all tensors at once, and passes over most of what files say of
their tokenizers.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from truedepth.errors import TruedepthError
from truedepth.families.family import Family
from truedepth.families.lookup import original_family
from truedepth.plan.config import plan_of
from truedepth.sources.gguf.layout import ARCHITECTURES, CONFIG, from_llama_cpp
from truedepth.sources.gguf.reader import checked_reader, value
from truedepth.sources.gguf.tokenizer import (
    NO_TOKENIZER,
    build_tokenizer,
    chat_templates,
    check_tokenizer,
    save_tokenizer,
)
from truedepth.sources.gguf.vocabulary import Vocabulary, read_vocabulary
from truedepth.sources.limits import check_config
from truedepth.sources.source import Source
from truedepth.sources.stamps import Stamps
from truedepth.tensors import LazyTensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


def open_gguf(path: Path, name: str | None = None, origin: str = "GGUF file") -> Source:
    """Open a GGUF file of the llama architecture, or one that truedepth exported.

    Raises:
        TruedepthError: It is not a whole GGUF file, or not of a supported architecture or type.
    """
    stamps = Stamps()
    stamps.add(path)
    reader = checked_reader(path)
    architecture = value(reader, "general.architecture")
    if not isinstance(architecture, str):
        raise TruedepthError(f"{path} lacks the metadata 'general.architecture'.")
    if (parts := value(reader, "split.count", 1)) not in (0, 1):
        raise TruedepthError(
            f"{path} is one of {reprlib.repr(parts)} parts of a model; merge the parts with"
            " llama-gguf-split --merge."
        )
    if architecture not in ARCHITECTURES:
        raise TruedepthError(
            f"{path} has the GGUF architecture {reprlib.repr(architecture)}, which is not"
            f" supported; supported: {', '.join(sorted(ARCHITECTURES))}."
        )
    tokens = read_vocabulary(path, reader)
    if architecture == "deci":
        config = _exported_config(path, reader)
    else:
        config = _config(path, reader, tokens)
        if value(reader, gguf.Keys.Tokenizer.MODEL) not in NO_TOKENIZER:
            check_tokenizer(path, reader, tokens)

    @cache
    def load_tokenizer() -> PreTrainedTokenizerBase:
        if architecture == "deci":
            return _original_tokenizer(path, reader)
        check_tokenizer(path, reader, tokens)
        assert tokens is not None
        return build_tokenizer(path, reader, tokens)

    def check_companions() -> None:
        if value(reader, gguf.Keys.Tokenizer.MODEL) not in NO_TOKENIZER:
            load_tokenizer()

    def save_companions(out: Path) -> None:
        from transformers import GenerationConfig

        save_tokenizer(load_tokenizer(), out)
        GenerationConfig(
            **{key: config[key] for key in config if key.endswith("_token_id")}
        ).save_pretrained(out)

    kinds = {tensor.tensor_type for tensor in reader.tensors} - set(PLAIN)
    for kind in kinds:
        try:
            gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError as error:
            raise TruedepthError(
                f"{path} holds tensors of the type {kind.name}, which cannot be dequantized."
            ) from error
    return Source(
        name=name or path.name,
        origin=origin,
        path=path,
        config=config,
        read_tensors=lambda: {
            name: stamps.watched(path, tensor)
            for name, tensor in _tensors(path, reader, config).items()
        },
        check_companions=check_companions,
        save_companions=save_companions,
        load_tokenizer=load_tokenizer,
        stamps=stamps,
        quantization=", ".join(sorted(kind.name for kind in kinds)) or None,
    )


def _config(path: Path, reader: gguf.GGUFReader, tokens: Vocabulary | None) -> dict[str, Any]:
    """The config.json that a file of the llama architecture amounts to."""
    shapes = {tensor.name: tensor.shape for tensor in reader.tensors}

    def number(key: str, default: Any = None) -> Any:
        found = value(reader, f"llama.{key}", default)
        if found is None:
            raise TruedepthError(f"{path} lacks the metadata 'llama.{key}'.")
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise TruedepthError(
                f"{path} gives 'llama.{key}' as {reprlib.repr(found)}; it must be a number above 0."
            )
        return found

    if len(shapes.get("token_embd.weight", ())) != 2:
        raise TruedepthError(f"{path} lacks the matrix 'token_embd.weight'.")
    heads = number("attention.head_count")
    head_dim = number("attention.key_length", number("embedding_length") // heads)
    if number("rope.dimension_count", head_dim) != head_dim:
        raise TruedepthError(f"{path} applies RoPE to a part of each head, which is not supported.")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": number("rope.freq_base", 10000.0),
        },
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        **_token_ids(tokens),
    }
    if (scaling := value(reader, "llama.rope.scaling.type", "none")) != "none":
        raise TruedepthError(
            f"{path} scales RoPE by {reprlib.repr(scaling)}, which is not supported."
        )
    if tokens is not None and len(tokens.names) > config["vocab_size"]:
        raise TruedepthError(
            f"{path} has {len(tokens.names)} tokens, but embeds only {config['vocab_size']}"
            " (token_embd.weight); convert the original model again."
        )
    check_config(config, path)  # before anything as large as it says is made
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            config["rope_parameters"] |= _llama3_scaling(path, tensor.data, config)
    return config


def _token_ids(tokens: Vocabulary | None) -> dict[str, Any]:
    """The special tokens of config.json; several that end a text are a list, EOS first."""
    if tokens is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    ends = tokens.ends if len(tokens.ends) > 1 else next(iter(tokens.ends), None)
    return {
        "bos_token_id": tokens.roles.get("bos"),
        "eos_token_id": ends,
        "pad_token_id": tokens.roles.get("pad"),
    }


def _exported_config(path: Path, reader: gguf.GGUFReader) -> dict[str, Any]:
    """The config.json of the checkpoint that truedepth exported to the file."""
    try:
        config: dict[str, Any] = json.loads(value(reader, CONFIG, "{}"))
        plan = plan_of(config)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise TruedepthError(f"{path} has no valid config.json as metadata {CONFIG!r}.") from error
    if plan is None:
        raise TruedepthError(
            f"{path} has the GGUF architecture 'deci' but was not exported by truedepth; such"
            " files are not supported."
        )
    if len(plan.groups) != config.get("num_hidden_layers"):
        raise TruedepthError(
            f"{path} gives a plan of {len(plan.groups)} groups, but its num_hidden_layers is"
            f" {reprlib.repr(config.get('num_hidden_layers'))}."
        )
    return config


def _original_tokenizer(path: Path, reader: gguf.GGUFReader) -> PreTrainedTokenizerBase:
    """The tokenizer.json in the file, with the special tokens that llama.cpp's metadata name."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(value(reader, gguf.Keys.Tokenizer.HF_JSON))
    ids = {
        f"{name}_token": value(reader, f"tokenizer.ggml.{key}_token_id")
        for name, key in (
            *(("bos", "bos"), ("eos", "eos"), ("unk", "unknown")),
            *(("pad", "padding"), ("sep", "seperator")),  # llama.cpp's spelling
        )
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=chat_templates(path, reader),
        **{name: backend.id_to_token(token) for name, token in ids.items() if token is not None},
    )


def _llama3_scaling(path: Path, factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any]:
    """The Llama 3 RoPE parameters that give the frequency factors `factors` `[head_dim / 2]`.

    Llama 3.1 and later use these constants with a factor of 8 or 32. Other factors are refused.
    """
    theta, dim = config["rope_parameters"]["rope_theta"], config["head_dim"]
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelength = 2 * math.pi * theta ** (np.arange(0, dim, 2) / dim)
    blend = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - blend) / scaling["factor"] + blend)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise TruedepthError(f"{path} scales RoPE in a way that transformers' config cannot state.")
    return scaling


def _tensors(
    path: Path, reader: gguf.GGUFReader, config: dict[str, Any]
) -> Mapping[str, LazyTensor]:
    family, widths = original_family(config, str(path)), config.get("layer_widths")
    names = _transformers_names(family, config["num_hidden_layers"], reader)
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":  # part of the config, see _llama3_scaling
            continue
        if tensor.name not in names:
            raise TruedepthError(
                f"{path} has the tensor {reprlib.repr(tensor.name)}, which the family"
                f" {family.model_type} does not know."
            )
        name = names[tensor.name]
        layer, rest = family.split(name)
        heads = None
        if layer is not None and rest.startswith(("self_attn.q_proj.", "self_attn.k_proj.")):
            key = family.heads[rest.rpartition(".")[0]]
            heads = (config.get(key) or 0) * (widths[layer] if widths else 1)
            if not heads or tensor.shape[-1] % (2 * heads):
                raise TruedepthError(
                    f"{path} has {tensor.shape[-1]} rows in {tensor.name!r}, which cannot be"
                    f" {heads} heads ({key})."
                )
        tensors[name] = _lazy(tensor, heads)
    return tensors


def _transformers_names(family: Family, num_layers: int, reader: gguf.GGUFReader) -> dict[str, str]:
    """GGUF name -> transformers' name, for every tensor that a model of the family may have."""
    architecture = ARCHITECTURES[value(reader, "general.architecture")]
    to_gguf = gguf.get_tensor_name_map(architecture, num_layers)
    modules = list(family.outside) + [
        family.layer.format(layer) + module
        for layer in range(num_layers)
        for module in family.modules
    ]
    return {
        f"{to_gguf.get_name(module)}.{part}": f"{module}.{part}"
        for module in modules
        for part in ("weight", "bias")
    }


def _lazy(tensor: gguf.ReaderTensor, heads: int | None) -> LazyTensor:
    """A tensor, dequantized row by row.

    With `heads`, the rows of this q or k map are put in transformers' order. Quantization blocks
    lie within rows, so rows can be picked before they are dequantized.
    """
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind = tensor.tensor_type
    dtype = PLAIN.get(kind, torch.float32)
    data = tensor.data.reshape(shape[0], -1)  # for bfloat16 and quantized tensors, bytes
    order = np.arange(shape[0]) if heads is None else from_llama_cpp(shape[0], heads)

    def rows(start: int, stop: int) -> torch.Tensor:
        picked = data[order[start:stop]]
        if kind == gguf.GGMLQuantizationType.BF16:
            values = torch.from_numpy(picked.view(np.int16)).view(torch.bfloat16)
        elif kind in PLAIN:
            values = torch.from_numpy(picked)
        else:
            values = torch.from_numpy(gguf.dequantize(picked, kind))
        return values.reshape(stop - start, *shape[1:]).to(dtype)

    return LazyTensor(shape, dtype, rows)
