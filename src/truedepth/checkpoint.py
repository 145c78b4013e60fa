"""Writing a checkpoint: a directory that is either whole or not there.

Everything is written to a hidden sibling directory, which is renamed when it is complete. The
sibling is locked while it is written, so that a second run on the same output is refused, and what
a killed run left behind is recognised and removed by the next.

Shapes are known before values, so a shard's header is written first and its tensors are streamed
after it, a block at a time: memory does not grow with the model.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from torch import Tensor

from truedepth.errors import TruedepthError
from truedepth.tensors import LazyTensor

BLOCK_BYTES = 1 << 20  # small enough to stay in cache and to be reused by the allocator

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
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def atomic_directory(out: Path, force: bool = False) -> Iterator[Path]:
    """A directory to write to, which becomes `out` when the block ends without an exception.

    With `force` an existing `out` is replaced at that moment and not before.

    Raises:
        TruedepthError: `out` exists, is being written by another run, or cannot be written. An
            OSError of the block, such as a full disk, becomes one too.
    """
    out = out.absolute()
    if out.exists() and not force:
        raise TruedepthError(f"{out} exists already; give --force to replace it.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise TruedepthError(f"Cannot write to {out}: {error.strerror}.") from error
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TruedepthError(f"{out} is being written by another run.") from error
        try:
            _empty(partial)
            yield partial
            _sync(partial)
            if out.exists() and not force:
                raise TruedepthError(f"{out} has appeared meanwhile; give --force to replace it.")
            _rename(partial, out)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                raise TruedepthError(
                    f"Writing {out} failed: {reason}; nothing of it was kept.", exit_code=1
                ) from error
            raise
    finally:
        os.close(lock)


def write_weights(
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    shard_size: int | str = "5GB",
    progress: Callable[[int], object] = lambda written: None,
) -> int:
    """Write `tensors` as safetensors, sharded, with an index where there are several shards.

    Args:
        directory: Where to.
        tensors: By name; read one block at a time, each once, in order.
        shard_size: Most bytes a shard holds, as a number or such as `"5GB"`. A tensor larger than
            that gets a shard of its own.
        progress: Called with the number of bytes of every block written.

    Returns:
        The number of bytes of all tensors.

    Raises:
        TruedepthError: `shard_size` is not a size.
    """
    try:
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=FILENAME_PATTERN,
            max_shard_size=shard_size,
        )
    except ValueError as error:
        raise TruedepthError(f"{shard_size!r} is not a size; write it as 5GB.") from error
    for filename, names in split.filename_to_tensors.items():
        _write_shard(directory / filename, {name: tensors[name] for name in names}, progress)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_shard(
    path: Path, tensors: Mapping[str, LazyTensor], progress: Callable[[int], object]
) -> None:
    """One safetensors file: header length (8 bytes), JSON header, tensors without gaps."""
    # Wider types first keeps every tensor aligned to its element size.
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
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in ordered:
            for block in tensors[name].blocks(BLOCK_BYTES):
                progress(_write_block(file, block))


def _write_block(file: BinaryIO, block: Tensor) -> int:
    raw = block.contiguous().reshape(-1).view(torch.uint8)
    return file.write(raw.numpy().data)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(directory: Path) -> None:
    """Contents must reach the disk before the rename that vouches for them."""
    for file in (*filter(Path.is_file, directory.rglob("*")), directory):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(partial: Path, out: Path) -> None:
    replaced = out.with_name(f".{out.name}.replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    if replaced.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.unlink()
