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
        Exception: The file is not a whole GGUF file; the types of exception are many.
    """
    with path.open("rb") as file:
        _Header(file, path.stat().st_size).check()
    return _Reader(path)


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
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.strings = file, size, 0

    def check(self) -> None:
        magic, version = self.number("<I"), self.number("<I")
        if magic != gguf.GGUF_MAGIC or version not in (2, 3):  # nor big-endian files
            raise ValueError("not a GGUF file of a known version")
        tensors, fields = self.number("<Q"), self.number("<Q")
        if tensors > MAX_TENSORS or fields > MAX_FIELDS:
            raise ValueError(f"{tensors} tensors and {fields} fields")
        alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        for _ in range(fields):
            key, kind = self.text(), Kind(self.number("<I"))
            if key == b"general.alignment" and kind is Kind.UINT32:
                alignment = self.number("<I")
            else:
                self.value(kind)
        ends = [self.tensor() for _ in range(tensors)]
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {alignment} bytes")
        start = -(-self.file.tell() // alignment) * alignment
        if ends and start + max(ends) > self.size:
            raise ValueError("tensors end beyond the file")

    def number(self, form: str) -> int:
        held = self.file.read(struct.calcsize(form))
        if len(held) < struct.calcsize(form):
            raise ValueError("the file ends in its header")
        return int(struct.unpack(form, held)[0])

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError("a value ends beyond the file")
        self.file.seek(count, 1)

    def text(self) -> bytes:
        length = self.number("<Q")
        if length > MAX_KEY_BYTES:
            raise ValueError(f"a name of {length} bytes")
        return self.file.read(length)

    def value(self, kind: gguf.GGUFValueType) -> None:
        if kind is Kind.STRING:
            self.skip(self.number("<Q"))
        elif kind is not Kind.ARRAY:
            self.skip(SCALARS[kind])
        else:
            of, count = Kind(self.number("<I")), self.number("<Q")
            if of is Kind.ARRAY:
                raise ValueError("an array of arrays")
            if of is Kind.STRING:
                self.strings += count
                if self.strings > MAX_STRINGS:
                    raise ValueError(f"{self.strings} strings in arrays")
                for _ in range(count):
                    self.skip(self.number("<Q"))
            else:
                self.skip(count * SCALARS[of])

    def tensor(self) -> int:
        """Offset of the end of a tensor's data, from the beginning of all data."""
        self.text()
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind, offset = gguf.GGMLQuantizationType(self.number("<I")), self.number("<Q")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[0] % block or (block > 1 and dimensions == 1):
            raise ValueError(f"a tensor of shape {shape}")
        return offset + prod(shape) // int(block) * int(size)
