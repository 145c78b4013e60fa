"""gguf's reader, made safe for files from elsewhere.

That reader (gguf 0.19) believes every count: an array of 2^60 elements keeps it busy for ever while
its memory grows. So the header is checked first, and counts that the file's own size contradicts
are refused. It also makes an object of 600 bytes for every element of an array, where a slice of
the file is enough.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from truedepth.errors import TruedepthError, reason_of

MAX_STRINGS = 2_000_000  # in arrays; a vocabulary of 200,000 tokens has 650,000 with its merges
MAX_FIELDS = 100_000
MAX_TENSORS = 100_000
MAX_KEY_BYTES = 1 << 16
MAX_DIMENSIONS = 4

Kind = gguf.GGUFValueType

SCALARS = {
    **dict.fromkeys((Kind.UINT8, Kind.INT8, Kind.BOOL), 1),
    **dict.fromkeys((Kind.UINT16, Kind.INT16), 2),
    **dict.fromkeys((Kind.UINT32, Kind.INT32, Kind.FLOAT32), 4),
    **dict.fromkeys((Kind.UINT64, Kind.INT64, Kind.FLOAT64), 8),
}
"""Bytes per value."""


def checked_reader(path: Path) -> gguf.GGUFReader:
    """The reader of a file, after its header's counts and offsets are checked against its size.

    Raises:
        TruedepthError: The file is not a whole GGUF file of known types; the reason is named.
    """
    try:
        with path.open("rb") as file:
            _Header(path, file, path.stat().st_size).check()
        return _Reader(path)
    except TruedepthError:
        raise
    except OSError as error:
        raise TruedepthError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # the reader raises whatever an odd field causes
        raise TruedepthError(f"{path} is not a valid GGUF file: {reason_of(error)}") from error


def value(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata key, or `default` if the file lacks it.

    Raises:
        TruedepthError: The value is malformed, for example text that is not UTF-8.
    """
    if key not in reader.fields:
        return default
    try:
        return reader.fields[key].contents()
    except (ValueError, IndexError) as error:
        raise TruedepthError(f"The GGUF metadata {key!r} is malformed: {error}.") from error


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Reads each array as one slice of the file."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], Any, Any]:
        if raw_type != Kind.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
        of, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, at = Kind(of[0]), orig_offs + 12
        parts = [of, count]
        if kind is Kind.STRING:
            for _ in range(int(count[0])):
                (length,) = struct.unpack_from("<Q", self.data, at)
                parts.append(self.data[at + 8 : at + 8 + length])
                at += 8 + length
        else:
            parts.append(self._get(at, self.gguf_scalar_to_np[kind], count[0]))
            at += parts[-1].nbytes
        return at - orig_offs, parts, range(2, len(parts)), [Kind.ARRAY, kind]


class _Header:
    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.strings = path, file, size, 0
        self.within = "its header"
        """What is being read, for the reader of an error."""

    def check(self) -> None:
        self.check_version()
        tensors, fields = self.number("<Q"), self.number("<Q")
        if tensors > MAX_TENSORS or fields > MAX_FIELDS:
            raise self.invalid(f"it counts {tensors} tensors and {fields} fields of metadata")
        alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        for _ in range(fields):
            key = self.text("the name of a field of metadata")
            self.within = f"the metadata {key!r}"
            kind = self.kind(self.number("<I"))
            if key == "general.alignment" and kind is Kind.UINT32:
                alignment = self.number("<I")
            else:
                self.value(kind)
        ends = [self.tensor() for _ in range(tensors)]
        if alignment < 1 or alignment & (alignment - 1):
            raise self.invalid(f"it aligns tensors to {alignment} bytes, not to a power of two")
        start = -(-self.file.tell() // alignment) * alignment
        for end, name in ends:
            if start + end > self.size:
                raise self.cut(f"the tensor {name!r}", start + end)

    def check_version(self) -> None:
        begun = self.file.read(8)
        if begun[:4] != b"GGUF":
            kind = "is empty" if not begun else f"begins with {begun!r}"
            if begun == b"version ":
                kind = "is a pointer of Git LFS (fetch the file itself with git lfs pull)"
            raise TruedepthError(f"{self.path} is not a GGUF file: it {kind}.")
        if len(begun) < 8:
            raise self.cut(self.within, 8)
        (version,) = struct.unpack("<I", begun[4:])
        if not version & 0xFFFF:
            raise TruedepthError(
                f"{self.path} is a GGUF file for big-endian machines; convert it with"
                " gguf-convert-endian (Python package gguf)."
            )
        if version not in (2, 3):
            raise TruedepthError(
                f"{self.path} is a GGUF file of version {version}, but only versions 2 and 3 are"
                " read; convert the original model again."
            )

    def invalid(self, reason: str) -> TruedepthError:
        return TruedepthError(f"{self.path} is not a valid GGUF file: {reason}.")

    def cut(self, what: str, end: int) -> TruedepthError:
        return TruedepthError(
            f"{self.path} is truncated: it ends at byte {self.size}, and {what} would end at byte"
            f" {end}; download or copy it again."
        )

    def kind(self, number: int) -> gguf.GGUFValueType:
        try:
            return Kind(number)
        except ValueError:
            raise self.invalid(
                f"{self.within} has a value of type {number}, which GGUF does not define"
            ) from None

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        held = self.file.read(size)
        if len(held) < size:
            raise self.cut(self.within, self.file.tell() - len(held) + size)
        return int(struct.unpack(form, held)[0])

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self.cut(self.within, self.file.tell() + count)
        self.file.seek(count, 1)

    def text(self, what: str) -> str:
        self.within = what
        length = self.number("<Q")
        if length > MAX_KEY_BYTES:
            raise self.invalid(f"{what} has {length} bytes")
        if length > self.size - self.file.tell():
            raise self.cut(what, self.file.tell() + length)
        return self.file.read(length).decode(errors="replace")

    def value(self, kind: gguf.GGUFValueType) -> None:
        if kind is Kind.STRING:
            self.skip(self.number("<Q"))
        elif kind is not Kind.ARRAY:
            self.skip(SCALARS[kind])
        else:
            of, count = self.kind(self.number("<I")), self.number("<Q")
            if of is Kind.ARRAY:
                raise self.invalid(f"{self.within} is an array of arrays")
            if of is Kind.STRING:
                self.strings += count
                if self.strings > MAX_STRINGS:
                    raise self.invalid(f"its arrays count {self.strings} strings")
                for _ in range(count):
                    self.skip(self.number("<Q"))
            else:
                self.skip(count * SCALARS[of])

    def tensor(self) -> tuple[int, str]:
        """Offset of the end of a tensor's data from the beginning of all data, and its name."""
        name = self.text("the name of a tensor")
        self.within = f"the header of the tensor {name!r}"
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.invalid(f"the tensor {name!r} has {dimensions} dimensions")
        shape = [self.number("<Q") for _ in range(dimensions)]
        number, offset = self.number("<I"), self.number("<Q")
        try:
            block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        except (ValueError, KeyError):
            raise TruedepthError(
                f"{self.path} holds the tensor {name!r} in the type {number}, which the installed"
                " package gguf does not know; upgrade gguf, or take a file of another type."
            ) from None
        if min(shape) < 1 or shape[0] % block or (block > 1 and dimensions == 1):
            raise self.invalid(f"the tensor {name!r} has the shape {shape}")
        return offset + prod(shape) // int(block) * int(size), name
