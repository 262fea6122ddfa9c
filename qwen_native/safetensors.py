"""Reads safetensors files, single or sharded, without copying and without trusting them.

Format: 8 bytes little-endian header length; a JSON object {name: {dtype, shape, data_offsets}},
offsets relative to the end of the header; the data, without holes. A sharded checkpoint adds an
index {"weight_map": {name: file}}. Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from qwen_native.errors import CheckpointError, quoted
from qwen_native.files import MappedFile, parse_json_object, read_json_object
from qwen_native.tensor_source import TensorSource

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of the safetensors types whose elements are whole bytes."""

MAX_HEADER_BYTES = 1 << 24
"""Room for more than 100,000 tensors; the largest dense Qwen has fewer than 1,200."""

_MAX_DIMS = 8
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,240}\.safetensors")


def read_safetensors(path: Path) -> tuple[dict[str, TensorSource], MappedFile]:
    """Map one safetensors file and check its header against its size.

    Raises:
        CheckpointError: the file is truncated or its header is not consistent: bad JSON, unknown
            dtype, shape that does not fit the offsets, tensors that overlap or leave holes.
    """
    file = MappedFile(path)
    size = file.bytes.nbytes
    if size < 8:
        raise CheckpointError(f"{path}: has {size} bytes, too few for a safetensors header")
    header_bytes = int.from_bytes(file.buffer[:8], "little")
    if header_bytes > size - 8:
        raise CheckpointError(
            f"{path}: header length is {header_bytes}, but only {size - 8} bytes follow; "
            "the file is truncated or not safetensors"
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length is {header_bytes}, expected at most {MAX_HEADER_BYTES}"
        )
    data_start = 8 + header_bytes
    header = parse_json_object(file.buffer[8:data_start], f"{path}: header")
    _check_metadata(header.pop("__metadata__", {}), path)

    tensors: dict[str, TensorSource] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        where = f"{path}: tensor {quoted(name)}"
        dtype, shape, begin, end = _check_entry(entry, size - data_start, where)
        ranges.append((begin, end, name))
        data = file.bytes[data_start + begin : data_start + end]
        tensors[name] = TensorSource(name, dtype, shape, data, path)
    _check_ranges(ranges, size - data_start, path)
    return tensors, file


def read_sharded_safetensors(index: Path) -> tuple[dict[str, TensorSource], list[MappedFile]]:
    """Map all shards that an index file (`model.safetensors.index.json`) names.

    Raises:
        CheckpointError: the index is not valid, a shard name is not a plain file name, a shard is
            missing or bad, or index and shards disagree about which tensor lies where.
    """
    weight_map = read_json_object(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty, expected {{name: file}}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index}: weight_map[{quoted(name)}] is {quoted(shard)}, expected the plain name "
                "of a .safetensors file in the same folder"
            )

    tensors: dict[str, TensorSource] = {}
    files: list[MappedFile] = []
    for shard in sorted(set(weight_map.values())):
        if not os.path.exists(index.parent / shard):
            raise CheckpointError(
                f"{index.parent / shard}: shard is missing, {index.name} names it"
            )
        found, file = read_safetensors(index.parent / shard)
        files.append(file)
        for name, tensor in found.items():
            if weight_map.get(name) != shard:
                elsewhere = quoted(weight_map[name]) if name in weight_map else "nowhere"
                raise CheckpointError(
                    f"{index.parent / shard}: holds tensor {quoted(name)}, "
                    f"which {index.name} places {elsewhere}"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{index.parent / shard}: tensor {quoted(name)} is missing, {index.name} names it"
            )
    return tensors, files


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{path}: __metadata__ is {quoted(metadata)}, expected an object of strings"
        )


def _check_entry(entry: Any, data_bytes: int, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """Return (dtype, shape, begin, end) of one header entry, checked against the data's size."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: entry is {quoted(entry)}, expected dtype, shape and data_offsets"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{where}: dtype is {quoted(dtype)}, expected one of {', '.join(ITEM_BYTES)}"
        )
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMS
        or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    ):
        raise CheckpointError(
            f"{where}: shape is {quoted(shape)}, expected at most {_MAX_DIMS} sizes"
        )
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int for n in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= data_bytes
    ):
        raise CheckpointError(
            f"{where}: data_offsets is {quoted(offsets)}, "
            f"expected [begin, end] within the {data_bytes} bytes of data"
        )
    expected = ITEM_BYTES[dtype]
    for n in shape:
        expected *= n
    begin, end = offsets
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: data_offsets span {end - begin} bytes, "
            f"but {dtype} of shape {tuple(shape)} needs {expected}"
        )
    return dtype, tuple(shape), begin, end


def _check_ranges(ranges: list[tuple[int, int, str]], data_bytes: int, path: Path) -> None:
    """The format demands that the tensors cover the data exactly: no overlap, no hole."""
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "follows a hole"
            raise CheckpointError(
                f"{path}: tensor {quoted(name)} {problem}: "
                f"it begins at byte {begin}, expected {position}"
            )
        position = end
    if position != data_bytes:
        raise CheckpointError(
            f"{path}: tensors cover {position} bytes, but the file holds {data_bytes} bytes of data"
        )
