"""Reads GGUF files (version 2 and 3, little-endian) without copying and without trusting them.

Layout: magic, version, tensor count, pair count; key/value pairs; tensor descriptions (name,
dimensions with the fastest first, type, offset); padding; data. Every length, count and offset is
compared with what is left of the file before anything is allocated.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from qwen_native.errors import CheckpointError, quoted
from qwen_native.files import MappedFile
from qwen_native.tensor_source import TensorSource

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}  # fmt: skip
"""Supported tensor types: elements per block, bytes per block."""

_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""ggml's type numbers, also those not supported, so that an error can name them."""

_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<B"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9

_MIN_PAIR_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_MAX_HEADER_BYTES = 1 << 28
_MAX_KEY_BYTES = 1 << 16
_MAX_ARRAY_DEPTH = 4
_MAX_ALIGNMENT = 1 << 20
_DEFAULT_ALIGNMENT = 32

_LAZY_KEYS = {"tokenizer.ggml.merges"}
"""Long string arrays that most callers never look at: checked while reading, decoded on demand."""


class LazyStrings(Sequence[bytes]):
    """An array of strings of a GGUF file, decoded when it is first looked into.

    The reader has already checked that every string lies inside the file.
    """

    __slots__ = ("_decoded", "_file", "_length", "_position")

    def __init__(self, file: MappedFile, position: int, length: int) -> None:
        self._file = file
        self._position = position
        self._length = length
        self._decoded: list[bytes] | None = None

    def _strings(self) -> list[bytes]:
        if self._decoded is None:
            self._decoded = _Reader(self._file, self._position).strings(self._length, "array")
        return self._decoded

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._strings())

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        return self._strings()[index]


class _Reader:
    """A position in the header; every read checks first that the header can reach so far."""

    def __init__(self, file: MappedFile, position: int = 0) -> None:
        self.file = file
        self.buffer = file.buffer
        self.size = min(file.bytes.nbytes, _MAX_HEADER_BYTES)
        self.position = position

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {problem}")

    def take(self, count: int, what: str) -> int:
        """Advance by `count` bytes and return the position before."""
        begin = self.position
        if count > self.size - begin:
            raise self.error(
                f"{what} needs {count} bytes at byte {begin}, past the end at byte {self.size}"
            )
        self.position = begin + count
        return begin

    def scalar(self, layout: struct.Struct, what: str) -> Any:
        return layout.unpack_from(self.buffer, self.take(layout.size, what))[0]

    def u32(self, what: str) -> int:
        return int(self.scalar(_SCALARS[4], what))

    def u64(self, what: str) -> int:
        return int(self.scalar(_SCALARS[10], what))

    def text(self, what: str, limit: int | None = None) -> str:
        length = self.u64(f"length of {what}")
        if limit is not None and length > limit:
            raise self.error(f"{what} has {length} bytes, expected at most {limit}")
        begin = self.take(length, what)
        try:
            return self.buffer[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 at byte {begin + error.start}") from error

    def check_count(self, count: int, item_bytes: int, what: str) -> None:
        """Refuse a count whose items cannot fit in the rest of the file."""
        if count > (self.size - self.position) // item_bytes:
            raise self.error(
                f"{what} count is {count}, but only {self.size - self.position} bytes are left"
            )

    def strings(self, count: int, what: str) -> list[bytes]:
        self.check_count(count, 8, what)
        unpack, buffer, size = _SCALARS[10].unpack_from, self.buffer, self.size
        position = self.position
        result: list[bytes] = []
        append = result.append
        try:
            for _ in range(count):
                begin = position + 8
                position = begin + unpack(buffer, position)[0]
                if position > size:
                    break
                append(buffer[begin:position])
        except struct.error:
            position = size + 1
        if position > size:
            raise self.error(f"{what} holds a string that reaches past the end at byte {size}")
        self.position = position
        return result

    def skip_strings(self, count: int, what: str) -> None:
        self.check_count(count, 8, what)
        unpack, buffer, size = _SCALARS[10].unpack_from, self.buffer, self.size
        position = self.position
        try:
            for _ in range(count):
                position += 8 + unpack(buffer, position)[0]
        except (struct.error, OverflowError):
            position = size + 1
        if position > size:
            raise self.error(f"{what} holds a string that reaches past the end at byte {size}")
        self.position = position

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        what = f"value of {quoted(key)}"
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self.array(key, what, depth)
        if kind not in _SCALARS:
            raise self.error(f"{what} has type {kind}, expected 0 to 12")
        value = self.scalar(_SCALARS[kind], what)
        if kind == _BOOL:
            if value > 1:
                raise self.error(f"{what} is {value}, expected 0 or 1 for a boolean")
            return bool(value)
        return value

    def array(self, key: str, what: str, depth: int) -> Any:
        if depth == _MAX_ARRAY_DEPTH:
            raise self.error(f"{what} nests arrays more than {_MAX_ARRAY_DEPTH} deep")
        kind = self.u32(what)
        count = self.u64(what)
        if kind == _STRING:
            if key not in _LAZY_KEYS:
                return self.strings(count, what)
            begin = self.position
            self.skip_strings(count, what)
            return LazyStrings(self.file, begin, count)
        if kind == _ARRAY:
            self.check_count(count, 4 + 8, what)
            return [self.value(_ARRAY, key, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.error(f"{what} is an array of type {kind}, expected 0 to 12")
        dtype = np.dtype(_SCALARS[kind].format)
        self.check_count(count, dtype.itemsize, what)
        begin = self.take(count * dtype.itemsize, what)
        values = np.frombuffer(self.buffer, dtype, count, begin)
        if kind == _BOOL:
            if values.size and int(values.max()) > 1:
                raise self.error(f"{what} holds {int(values.max())}, expected 0 or 1 for booleans")
            return values.view(np.bool_)
        return values


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, TensorSource], MappedFile]:
    """Map a GGUF file and check its header against its size.

    Returns:
        The metadata by key: int, float, bool, str; arrays of numbers as read-only numpy arrays,
        arrays of strings as `list[bytes]` (token texts need not be UTF-8), the merges as a
        `LazyStrings`. The tensors by name, with shapes row-major (GGUF's dimensions reversed).
        The map that all views share.

    Raises:
        CheckpointError: the file is truncated, is not GGUF 2 or 3, or lies about a length, a count,
            an offset, a type; a tensor overlaps another; a tensor's type is not supported.
    """
    file = MappedFile(path)
    reader = _Reader(file)
    begin = reader.take(4, "magic")
    magic = file.buffer[begin : begin + 4]
    if magic != b"GGUF":
        raise reader.error(f"begins with {quoted(magic)}, expected b'GGUF'")
    version = reader.u32("version")
    if version not in (2, 3):
        hint = ", a big-endian file" if version in (2 << 24, 3 << 24) else ""
        raise reader.error(f"GGUF version is {version}{hint}, expected 2 or 3, little-endian")
    tensor_count = reader.u64("tensor count")
    pair_count = reader.u64("metadata count")
    metadata = _read_metadata(reader, pair_count)
    return metadata, _read_tensors(reader, tensor_count, _alignment(reader, metadata)), file


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    reader.check_count(count, _MIN_PAIR_BYTES, "metadata")
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text("metadata key", _MAX_KEY_BYTES)
        if key in metadata:
            raise reader.error(f"metadata key {quoted(key)} occurs more than once")
        metadata[key] = reader.value(reader.u32(f"type of {quoted(key)}"), key)
    return metadata


def _alignment(reader: _Reader, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if (
        type(alignment) is not int
        or not 1 <= alignment <= _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise reader.error(
            f"general.alignment is {quoted(alignment)}, "
            f"expected a power of two up to {_MAX_ALIGNMENT}"
        )
    return alignment


def _read_tensors(reader: _Reader, count: int, alignment: int) -> dict[str, TensorSource]:
    reader.check_count(count, _MIN_TENSOR_BYTES, "tensor")
    described: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.text("tensor name", _MAX_KEY_BYTES)
        if name in described:
            raise reader.error(f"tensor {quoted(name)} occurs more than once")
        described[name] = _read_description(reader, name, alignment)

    data_start = -(-reader.position // alignment) * alignment
    data_bytes = max(reader.file.bytes.nbytes - data_start, 0)
    tensors: dict[str, TensorSource] = {}
    for name, (dtype, shape, offset, length) in described.items():
        if offset + length > data_bytes:
            raise reader.error(
                f"tensor {quoted(name)} needs bytes {offset} to {offset + length} of the data, "
                f"but the file holds {data_bytes}; it is truncated or damaged"
            )
        begin = data_start + offset
        data = reader.file.bytes[begin : begin + length]
        tensors[name] = TensorSource(name, dtype, shape, data, reader.file.path)
    _check_overlaps(reader, described)
    return tensors


def _read_description(
    reader: _Reader, name: str, alignment: int
) -> tuple[str, tuple[int, ...], int, int]:
    """Return (dtype, row-major shape, offset, bytes) of the tensor described at the reader."""
    what = f"tensor {quoted(name)}"
    dims = reader.u32(what)
    if not 1 <= dims <= 4:
        raise reader.error(f"{what} has {dims} dimensions, expected 1 to 4")
    shape = tuple(reader.u64(what) for _ in range(dims))[::-1]
    number = reader.u32(what)
    offset = reader.u64(what)
    dtype = _TENSOR_TYPES.get(number, f"number {number}")
    if dtype not in BLOCKS:
        raise reader.error(
            f"{what} has the unsupported type {dtype}, expected one of {', '.join(BLOCKS)}"
        )
    block, block_bytes = BLOCKS[dtype]
    if not all(shape):
        raise reader.error(f"{what} has shape {shape}, expected no empty dimension")
    if shape[-1] % block:
        raise reader.error(f"{what} has rows of {shape[-1]}, expected a multiple of {block}")
    if offset % alignment:
        raise reader.error(f"{what} has offset {offset}, expected a multiple of {alignment}")
    elements = 1
    for size in shape:
        elements *= size
    return dtype, shape, offset, elements // block * block_bytes


def _check_overlaps(
    reader: _Reader, described: dict[str, tuple[str, tuple[int, ...], int, int]]
) -> None:
    ranges = sorted((offset, length, name) for name, (_, _, offset, length) in described.items())
    for (offset, length, name), (next_offset, _, next_name) in zip(
        ranges, ranges[1:], strict=False
    ):
        if offset + length > next_offset:
            raise reader.error(f"tensors {quoted(name)} and {quoted(next_name)} overlap")
