"""Writes a checkpoint.

Shapes are known before values, so a shard's header is written first, and its tensors are streamed
after it a block at a time: memory does not grow with the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory

from truedepth import modeling
from truedepth.errors import TruedepthError
from truedepth.files.atomic import atomic_directory
from truedepth.files.copying import Copier, copier
from truedepth.progress import progress_bar
from truedepth.sources.source import Source
from truedepth.sources.tokenizer import complete_tokenizer
from truedepth.tensors import LazyTensor

FILENAME_PATTERN = "model{suffix}.safetensors"

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_checkpoint(
    out: Path,
    source: Source,
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    card: str,
    shard_size: int | str,
    force: bool,
    kept: Path | None = None,
) -> int:
    """Write a checkpoint, whole or not at all.

    Args:
        out: The directory to make.
        source: The model whose tokenizer and generation config go along.
        config: The contents of config.json.
        tensors: The weights by name.
        card: The contents of README.md.
        shard_size: Most bytes per file of weights, as for `write_weights`.
        force: Replace `out` if it exists.
        kept: A directory that the run kept beside `out`, all of which is in `tensors`.

    Returns:
        The number of bytes of all weights.

    Raises:
        NotFiniteError: A tensor holds NaN or an infinity; nothing is kept.
        TruedepthError: `out` cannot be written, or the source changed while it was read.
    """
    with atomic_directory(out, force, kept) as partial:
        total = sum(tensor.nbytes for tensor in tensors.values())
        try:
            with progress_bar("Writing", total, unit="bytes") as advance:
                size = write_weights(partial, tensors, shard_size, advance)
        except OSError:  # also when a block is missing because its file was cut short
            source.check_unchanged()
            raise
        source.save_companions(partial)
        complete_tokenizer(source, partial)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        for file in modeling.FILES:
            shutil.copyfile(file, partial / file.name)
        (partial / "README.md").write_text(card, encoding="utf-8")
        source.check_unchanged()
    return size


def write_weights(
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    shard_size: int | str = "5GB",
    progress: Callable[[int], object] = lambda written: None,
) -> int:
    """Write `tensors` as safetensors, in shards; several shards get an index.

    Args:
        directory: An existing directory.
        tensors: The weights by name; read a few blocks at a time, each block once.
        shard_size: Most bytes per shard, as a number or text such as `"5GB"`. A larger tensor gets
            a shard of its own.
        progress: Called with the number of bytes of each block, when it is written.

    Returns:
        The number of bytes of all tensors.

    Raises:
        NotFiniteError: A tensor holds NaN or an infinity.
        TruedepthError: `shard_size` is not a size.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=FILENAME_PATTERN,
        max_shard_size=_bytes(shard_size),
    )
    with copier() as copies:
        for filename, names in split.filename_to_tensors.items():
            held = {name: tensors[name] for name in names}
            _write_shard(directory / filename, held, copies, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


def _bytes(size: int | str) -> int:
    """The number of bytes in `"5GB"`, `"500 MiB"`, `"5000000"` or a number."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    units |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
    match = re.fullmatch(r"(\d+)\s*([KMGT]?I?)B?", str(size).strip().upper())
    count = int(match[1]) * units.get(match[2], 0) if match else 0
    if count < 1:
        raise TruedepthError(f"{size!r} is not a file size; write it as 5GB.")
    return count


def _write_shard(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    copies: Copier,
    progress: Callable[[int], object],
) -> None:
    """One safetensors file: header length (8 bytes), JSON header, tensors without gaps."""
    # Wider dtypes first: every tensor is aligned to its element size.
    ordered = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        tensor = tensors[name]
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.flush()
        offset = 8 + len(encoded)
        for name in ordered:
            for written in copies.copy(name, tensors[name], file.fileno(), offset):
                progress(written)
            offset += tensors[name].nbytes
