"""Weights that torch pickled, read only if the user allows it.

A pickle is a program. `torch.load(weights_only=True)` runs only what makes tensors and refuses the
rest, but it has had holes, so nothing here is read without permission.
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

MAX_PICKLE_BYTES = 64 << 20  # of the list of tensors; 100,000 tensors take 20 MB


def only_file(path: Path) -> str | None:
    """The name of the one file in a directory that holds all weights; None if there is none."""
    if (path / SINGLE_FILE).exists():
        return SINGLE_FILE
    found = [file.name for file in path.iterdir() if file.suffix in (".pt", ".pth")]
    return found[0] if len(found) == 1 else None


def open_pickle(file: Path) -> dict[str, LazyTensor]:
    """The tensors of one file. They share its memory map, so reading copies nothing.

    Raises:
        TruedepthError: The file holds anything but tensors by name, or is broken.
    """
    _check_archive(file)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle can raise anything
        raise TruedepthError(
            f"{file} holds something other than tensors, or is broken; it was not read."
        ) from error
    if not isinstance(held, dict) or not held:
        raise TruedepthError(f"{file} does not hold a dict of tensors by name.")
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TruedepthError(f"{file} holds something other than tensors by name.")
        if (
            tensor.layout != torch.strided
            or tensor.device.type != "cpu"
            or tensor.is_quantized
            or tensor.nbytes > tensor.untyped_storage().nbytes()  # one element, expanded
        ):
            raise TruedepthError(
                f"{file} holds {name!r} in a form that is not supported; save it as a dense tensor."
            )
    return {name: from_tensor(tensor.detach()) for name, tensor in held.items()}


def _check_archive(file: Path) -> None:
    """Refuse what is not torch's kind of archive, or could unpack to a thousand times its size."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise TruedepthError(
            f"{file} is not in the archive format that torch writes since version 1.6; save it"
            " again as safetensors."
        ) from error
    for member in members:
        packed = member.compress_type != zipfile.ZIP_STORED
        if packed or (member.filename.endswith(".pkl") and member.file_size > MAX_PICKLE_BYTES):
            raise TruedepthError(
                f"{file} is compressed or absurdly large inside, unlike what torch writes."
            )
