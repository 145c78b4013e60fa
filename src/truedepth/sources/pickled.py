"""Weights as torch pickles them, read only where the user says so.

A pickle is a program. `torch.load(weights_only=True)` runs a subset of it that can make tensors and
refuses the rest, but it has had holes, which is why nothing here is read without being asked for.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from truedepth.errors import TruedepthError
from truedepth.tensors import LazyTensor, from_tensor

SINGLE_FILE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
SUFFIXES = [".bin", ".pt", ".pth"]
PATTERNS = ["pytorch_model*.bin", "*.pt", "*.pth"]

MAX_PICKLE_BYTES = 64 << 20  # of what says which tensors there are; 100,000 take 20 MB


def only_file(path: Path) -> str | None:
    """The name of the file of a directory that holds all weights, if one does."""
    if (path / SINGLE_FILE).exists():
        return SINGLE_FILE
    found = [file.name for file in path.iterdir() if file.suffix in (".pt", ".pth")]
    return found[0] if len(found) == 1 else None


def open_pickle(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file. They share its memory map, so that reading makes no copy.

    Raises:
        TruedepthError: It is no file of tensors alone, or is broken.
    """
    _check_archive(file)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle can raise what it likes
        raise TruedepthError(
            f"{file} holds something else than tensors, or is broken, and is not read."
        ) from error
    if not isinstance(held, dict) or not held:
        raise TruedepthError(f"{file} does not hold tensors by name.")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TruedepthError(f"{file} does not hold tensors by name alone.")
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
            or tensor.nbytes > tensor.untyped_storage().nbytes()  # one element, stretched
        ):
            raise TruedepthError(f"{file} holds {name!r} in a form that is not supported.")
    return {name: from_tensor(tensor.detach()) for name, tensor in held.items()}


def _check_archive(file: Path) -> None:
    """It is an archive of what it says, not of something that unpacks to a thousand times that."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise TruedepthError(
            f"{file} is no archive of torch's, or one from before version 1.6, which is not"
            " supported; save it again as safetensors."
        ) from error
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or (member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES):
            raise TruedepthError(f"{file} is compressed or absurd, as torch writes no file.")
