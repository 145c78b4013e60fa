"""A GGUF file's header, looked through before gguf's reader takes it as it is.

That reader believes every count: one of 2^60 elements keeps it busy for ever, and its memory grows
meanwhile. Here no count is believed that the file's own size contradicts.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import BinaryIO

import gguf

MAX_ELEMENTS = 2_000_000  # of arrays; the reader keeps some 300 bytes of each. Gemma 3 has 1.3 M.
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
"""Bytes of each."""


def check_header(path: Path) -> None:
    """What the header counts and points to lies within the file.

    Raises:
        ValueError: Something does not, or is too much of it.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        _Header(file, path.stat().st_size).check()


class _Header:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.elements = file, size, 0

    def check(self) -> None:
        magic, version = self.number("<I"), self.number("<I")
        if magic != gguf.GGUF_MAGIC or version not in (2, 3):  # big-endian files neither
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
            raise ValueError(f"alignment to {alignment}")
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
            self.elements += count
            if of is Kind.ARRAY or self.elements > MAX_ELEMENTS:
                raise ValueError(f"{self.elements} elements of arrays")
            if of is Kind.STRING:
                for _ in range(count):
                    self.skip(self.number("<Q"))
            else:
                self.skip(count * SCALARS[of])

    def tensor(self) -> int:
        """Where its data end, from where all data begin."""
        self.text()
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind, offset = gguf.GGMLQuantizationType(self.number("<I")), self.number("<Q")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[0] % block:
            raise ValueError(f"a tensor of shape {shape}")
        return offset + prod(shape) // int(block) * int(size)
