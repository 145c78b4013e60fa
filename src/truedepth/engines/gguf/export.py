"""Writes layer-parallel checkpoints as GGUF files that an unmodified llama.cpp runs.

llama.cpp's architecture `deci` (Nemotron) lets every layer have its own number of heads and its own
FFN width; otherwise its layers are Llama's, with biases if the file has them. A checkpoint that
llama.cpp would not compute exactly is refused.
"""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from truedepth.engines.gguf.balance import balanced
from truedepth.engines.gguf.tokenizer import add_tokenizer, check_tokenizer
from truedepth.engines.gguf.types import MatrixType
from truedepth.engines.support import LLAMA_CPP_FAMILIES
from truedepth.errors import TruedepthError
from truedepth.families.lookup import original_family, unconverted
from truedepth.files.atomic import atomic_file, check_apart, check_output
from truedepth.plan.config import plan_of
from truedepth.plan.stages import said
from truedepth.progress import progress_bar, working
from truedepth.runtime.empty import transformers_config
from truedepth.sources.gguf.layout import CONFIG, GENERATION_CONFIG, to_llama_cpp
from truedepth.sources.opening import open_source
from truedepth.sources.source import Source
from truedepth.tensors import LazyTensor, common_dtype, from_tensor, pick_rows
from truedepth.widening.layout import Layout, check_loadable

ARCHITECTURE = gguf.MODEL_ARCH.DECI

BLOCK_BYTES = 1 << 22
"""Bytes of a tensor that are in memory at a time."""


EXACT = {torch.float16: MatrixType.f16, torch.bfloat16: MatrixType.bf16}
"""The type that holds a dtype's values exactly; f32 for all other dtypes."""


@dataclass(frozen=True)
class Export:
    """The file that `export` wrote."""

    path: Path
    type: MatrixType
    size: int
    """Size of the file in bytes."""

    tensors: dict[str, int]
    """Number of tensors by GGML type, such as `{"Q8_0": 30, "F32": 9}`."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-compatible data."""
        return {
            "path": str(self.path),
            "type": self.type.value,
            "size": self.size,
            "tensors": self.tensors,
        }


def export(
    model: str | Path | Source,
    out: str | Path,
    *,
    type: MatrixType | str = "auto",
    force: bool = False,
) -> Export:
    """Write a layer-parallel checkpoint as one GGUF file.

    Memory use does not grow with the model: tensors are read and written in blocks of rows.
    Vectors are float32 whatever the type, as llama.cpp expects.

    Args:
        model: A checkpoint that truedepth wrote. To export an unpaired model, convert it with a
            plan without pairs first.
        out: The `.gguf` file; it appears when it is complete.
        type: Type of the matrices; `auto` holds the checkpoint's own dtype exactly. k- and i-quants
            are made by llama.cpp's own quantizer, which needs `llama-cpp-python`.
        force: Replace `out` if it exists.

    Raises:
        TruedepthError: The type is unknown or cannot hold the model, llama.cpp would not compute
            the model exactly, the quantizer is missing, or `out` cannot be written.
    """
    source, out = open_source(model), Path(out).expanduser()
    _check_source(source)
    kind = MatrixType.of(type)
    if kind.needs_llama_cpp:
        from truedepth.runtime.llama_cpp import library

        library()
    if out.suffix != ".gguf":
        raise TruedepthError(f"The output {out} must end in .gguf.")
    check_apart(source.path, out.resolve())
    check_output(out, force)
    check_loadable(source.config, source.tensors, source.path)
    check_tokenizer(source)
    if kind is MatrixType.auto:
        matrices = [tensor for tensor in source.tensors.values() if len(tensor.shape) > 1]
        kind = EXACT.get(common_dtype(matrices), MatrixType.f32)
    with atomic_file(out, force) as partial:
        if not kind.needs_llama_cpp:
            _write(source, partial, kind, balance=kind.balanced)
        else:
            from truedepth.runtime.llama_cpp import quantize

            whole = partial.with_suffix(".whole")
            _write(source, whole, MatrixType.f32, balance=kind.balanced)
            with working(f"Quantizing to {kind.value}"):
                quantize(whole, partial, kind.value)
            whole.unlink()
        source.check_unchanged()
    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(out).tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return Export(out, kind, out.stat().st_size, counts)


def _check_source(source: Source) -> None:
    """Raise TruedepthError if llama.cpp would compute something else."""
    if source.path.is_file():
        raise TruedepthError(f"{source.path} is already a GGUF file; give the checkpoint.")
    plan = plan_of(source.config)
    if plan is None:
        raise TruedepthError(
            f"{source.path} is not a layer-parallel checkpoint; make one with truedepth convert"
            " (--pairs 0 keeps the model as it is)."
        )
    if plan.merged:
        raise TruedepthError(
            f"{source.path} runs stages of sub-layers such as {said(plan.merged[0])}, which"
            " llama.cpp's layers cannot; make a checkpoint of groups of layers with truedepth"
            " convert MODEL OUT --form pairs --max-loss LOSS."
        )
    config = transformers_config(source.config, source.path)
    if reason := _why_not_stored(source) or _why_not_computed(config):
        raise TruedepthError(
            f"{source.path} cannot be exported exactly to llama.cpp's architecture"
            f" {gguf.MODEL_ARCH_NAMES[ARCHITECTURE]!r}: {reason}."
        )


def _why_not_stored(source: Source) -> str | None:
    """Why the architecture has no place for some of the model's tensors, or None."""
    layout = Layout.of(source)
    if layout.executed_plan != layout.plan:
        return "it runs wide layers, but not layers side by side"
    names = gguf.get_tensor_name_map(ARCHITECTURE, source.num_layers)
    homeless = {
        re.sub(r"^model\.layers\.\d+\.", "", tensor)
        for tensor in source.tensors
        if names.get_name(tensor.rpartition(".")[0]) is None
    }
    if homeless:
        return f"it has no place for {', '.join(sorted(homeless))}"
    if (family := unconverted(source.config["model_type"])) not in LLAMA_CPP_FAMILIES:
        return f"it is not known to compute the family {family!r}"
    return None


def _why_not_computed(config: Any) -> str | None:
    """Why the architecture would compute something else with the model's tensors, or None."""
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or (
        ["sliding"] if window and window < config.max_position_embeddings else []
    )
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is SiLU, not {config.hidden_act}"
    if rope["rope_type"] not in ("default", "llama3"):
        return f"it computes RoPE scaling of type {rope['rope_type']!r} differently"
    if (part := rope.get("partial_rotary_factor", 1.0)) != 1:
        return f"it rotates whole heads, not {part} of them"
    if any("sliding" in kind for kind in kinds):
        return f"it has no sliding window, and this model's layers see only {window} tokens back"
    return None


def _write(source: Source, path: Path, kind: MatrixType, *, balance: bool) -> None:
    """Write the whole file, in a type that does not need llama.cpp's quantizer."""
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    tensors = gguf_tensors(source, balance)
    stored = {name: storage(kind, name, tensor) for name, tensor in tensors.items()}
    _add_metadata(writer, source, kind)
    add_tokenizer(writer, source)
    for name, (ggml, columns_bytes) in stored.items():
        shape = tensors[name].shape
        raw = (*shape[:-1], columns_bytes) if ggml.name not in ("F32", "F16") else shape
        dtype = {"F32": np.float32, "F16": np.float16}.get(ggml.name, np.uint8)
        size = columns_bytes * int(np.prod(shape[:-1], dtype=np.int64))
        writer.add_tensor_info(name, raw, np.dtype(dtype), size, raw_dtype=ggml)
    total = sum(tensor.nbytes for tensor in tensors.values())
    # Closed even if the disk is full; an open file would keep its space until it is collected.
    with closing(writer), progress_bar("Writing", total, unit="bytes") as advance:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        for name, (ggml, _) in stored.items():
            writer.write_padding(file, file.tell())
            for block in tensors[name].blocks(BLOCK_BYTES):
                _write_block(file, name, block, ggml)
                advance(block.nbytes)
        writer.write_padding(file, file.tell())


def storage(kind: MatrixType, name: str, tensor: LazyTensor) -> tuple[GGMLQuantizationType, int]:
    """Choose a tensor's GGML type, and compute the bytes of one of its rows.

    Vectors are float32. If the matrices are quantized, embedding and head are Q8_0.

    Args:
        kind: Type of the file's matrices; not one that needs llama.cpp's quantizer.
        name: The tensor's name in llama.cpp.
        tensor: The tensor.

    Raises:
        TruedepthError: The row length is not a multiple of the type's block size.
    """
    ggml = GGMLQuantizationType[kind.name.upper()]
    if len(tensor.shape) < 2:
        ggml = GGMLQuantizationType.F32
    elif kind.quantized and name.startswith(("token_embd.", "output.")):
        ggml = GGMLQuantizationType.Q8_0
    columns = tensor.shape[-1]
    block, size = gguf.GGML_QUANT_SIZES[ggml]
    if columns % block:
        raise TruedepthError(
            f"{kind.value} packs blocks of {block} columns, but {name} has {columns} columns;"
            " choose f16 or another type without blocks."
        )
    return ggml, columns // block * size


def _write_block(
    file: BinaryIO, name: str, block: torch.Tensor, ggml: GGMLQuantizationType
) -> None:
    values = block.to(torch.float32).contiguous()
    if ggml is GGMLQuantizationType.BF16:
        rounded = values.to(torch.bfloat16)
        data: Any = rounded.view(torch.uint8).numpy()
        finite = bool(rounded.isfinite().all())
    else:
        with np.errstate(all="ignore"):
            data = np.ascontiguousarray(gguf.quantize(values.numpy(), ggml))
        finite = bool(values.isfinite().all())
        if (
            finite and values.abs().max() > torch.finfo(torch.float16).max
        ):  # quantized blocks have float16 scales
            finite = bool(np.isfinite(gguf.dequantize(data, ggml)).all())
    if not finite:
        raise TruedepthError(
            f"{name} has values that are not finite in {ggml.name.lower()}; try --type bf16 or f32."
        )
    file.write(data.data)


def gguf_tensors(source: Source, balance: bool) -> dict[str, LazyTensor]:
    """The tensors of the file, by llama.cpp's names and in its order of rows.

    Args:
        source: A checkpoint that the architecture computes exactly.
        balance: Whether to rescale the weights so that quantization loses less.
    """
    config = transformers_config(source.config, source.path)
    names = gguf.get_tensor_name_map(ARCHITECTURE, source.num_layers)
    tensors: dict[str, LazyTensor] = {}
    held = balanced_tensors(source) if balance else source.tensors
    for name, tensor in held.items():
        module, _, part = name.rpartition(".")
        rotated = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        if heads := rotated.get(module.rpartition(".")[2]):
            layer = config.per_layer_config[int(name.split(".")[2])]
            order = to_llama_cpp(tensor.shape[0], getattr(layer, heads))
            tensor = pick_rows(tensor, torch.from_numpy(order))
        tensors[f"{names.get_name(module)}.{part}"] = tensor
    if config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = from_tensor(rope_factors(config))
    return tensors


def balanced_tensors(source: Source) -> dict[str, LazyTensor]:
    """Apply `balanced` to every layer; names are transformers'. Reads all weights once."""
    family = original_family(source.config, str(source.path))
    tensors = dict(source.tensors)
    for index in range(source.num_layers):
        prefix = family.layer.format(index)
        layer = {
            name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)
        }
        for name, tensor in balanced(family, layer).items():
            tensors[prefix + name] = tensor
    return tensors


def rope_factors(config: Any) -> torch.Tensor:
    """The divisors of RoPE's frequencies that llama.cpp expects, `[head_dim / 2]` float32."""
    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    factors: torch.Tensor = config.rope_parameters["rope_theta"] ** -exponents / scaled
    return factors


def _add_metadata(writer: GGUFWriter, source: Source, kind: MatrixType) -> None:
    config = transformers_config(source.config, source.path)
    layers, head_dim = config.per_layer_config, config.head_dim
    made = config.truedepth or {}
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.name)
    if original := made.get("source"):
        writer.add_description(f"{original}, layer-parallel (truedepth {made.get('version')})")
    file_types = gguf.LlamaFileType.__members__
    writer.add_file_type(file_types.get(f"MOSTLY_{kind.name.upper()}", file_types["ALL_F32"]))
    if kind.quantized:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count([layer.num_attention_heads for layer in layers])
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    writer.add_feed_forward_length([layer.intermediate_size for layer in layers])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_string(CONFIG, json.dumps(source.config))
    if (defaults := source.path / "generation_config.json").exists():
        writer.add_string(GENERATION_CONFIG, defaults.read_text(encoding="utf-8"))
