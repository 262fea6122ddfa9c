"""The safetensors reader against files written by the safetensors package, and against lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from mutations import INTERESTING, mutated, opens_or_refuses
from safetensors.torch import save_file

from qwen_native.errors import CheckpointError
from qwen_native.safetensors import MAX_HEADER_BYTES, read_safetensors, read_sharded_safetensors

TORCH_TYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def build(header: object, data: bytes = b"", padding: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += padding
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_reads_what_the_safetensors_package_writes(tmp_path: Path, rng: torch.Generator) -> None:
    saved = {}
    for i, (dtype, torch_type) in enumerate(TORCH_TYPES.items()):
        values = torch.randint(0, 2, (3, 5 + i), generator=rng)
        saved[f"tensor.{dtype}"] = values.to(torch_type)
    saved["empty"] = torch.zeros(0, 4)
    saved["scalar"] = torch.tensor(1.5)
    path = tmp_path / "a.safetensors"
    save_file(saved, path, metadata={"format": "pt"})

    tensors, _ = read_safetensors(path)

    assert tensors.keys() == saved.keys()
    for name, expected in saved.items():
        tensor = tensors[name]
        assert tensor.name == name and tensor.file == path
        assert TORCH_TYPES[tensor.dtype] == expected.dtype
        assert tensor.shape == tuple(expected.shape)
        assert not tensor.data.flags.writeable
        flat = expected.contiguous().flatten().view(torch.uint8) if expected.numel() else None
        assert tensor.data.tobytes() == (b"" if flat is None else flat.numpy().tobytes())


def test_data_are_views_of_one_map(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(8), "b": torch.zeros(8)}, path)
    tensors, file = read_safetensors(path)
    assert np.shares_memory(tensors["a"].data, file.bytes)
    assert np.shares_memory(tensors["b"].data, file.bytes)


BAD_FILES = {
    "empty file": (b"", "is empty"),
    "shorter than the length": (b"\x02\0\0", "too few"),
    "length past the end": ((1 << 40).to_bytes(8, "little") + b"{}", "header length is"),
    "not json": (build(b"{,}"), "not valid JSON"),
    "not utf-8": (build(b'{"\xff": 1}'), "not valid JSON"),
    "not an object": (build([1]), "expected an object"),
    "nested": (build(b"[" * 200_000), "nested too deeply"),
    "nan": (build(b'{"a": NaN}'), "NaN"),
    "huge number": (build(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "repeated key": (build(b'{"a": 1, "a": 2}'), "'a' occurs more than once"),
    "metadata of numbers": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry is a list": (build({"a": []}), "tensor 'a'"),
    "entry lacks shape": (build({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "tensor 'a'"),
    "unknown dtype": (build({"a": entry("F31")}, bytes(8)), "dtype is 'F31'"),
    "dtype is a list": (build({"a": entry([])}, bytes(8)), "dtype is []"),
    "shape is text": (build({"a": entry(shape="2")}, bytes(8)), "shape is '2'"),
    "shape holds a float": (build({"a": entry(shape=[2.0])}, bytes(8)), "shape is [2.0]"),
    "shape holds a bool": (build({"a": entry(shape=[True])}, bytes(8)), "shape is [True]"),
    "negative size": (build({"a": entry(shape=[-2])}, bytes(8)), "shape is [-2]"),
    "overflowing shape": (build({"a": entry(shape=[1 << 40] * 8)}, bytes(8)), "needs"),
    "too many sizes": (build({"a": entry(shape=[1] * 100)}, bytes(8)), "at most 8"),
    "three offsets": (build({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "data_offsets"),
    "negative offset": (build({"a": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets"),
    "reversed offsets": (build({"a": entry(offsets=[8, 0])}, bytes(8)), "data_offsets"),
    "offset past the end": (build({"a": entry(offsets=[0, 16])}, bytes(8)), "data_offsets"),
    "shape and offsets disagree": (build({"a": entry(shape=[3])}, bytes(8)), "needs 12"),
    "overlap": (
        build({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "'b' overlaps the tensor before it",
    ),
    "hole": (
        build({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
        "'b' follows a hole",
    ),
    "trailing data": (build({"a": entry()}, bytes(9)), "tensors cover 8 bytes"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_refuses(name: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[name]
    path = write(tmp_path / "a.safetensors", data)
    with pytest.raises(CheckpointError) as error:
        read_safetensors(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_refuses_a_header_longer_than_any_model_needs(tmp_path: Path) -> None:
    data = build({"a": entry()}, bytes(8), padding=b" " * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="expected at most"):
        read_safetensors(write(tmp_path / "a.safetensors", data))


def test_refuses_what_is_not_a_regular_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_safetensors(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_safetensors(tmp_path / "missing.safetensors")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shards(folder: Path, weight_map: Any) -> Path:
    save_file({"a": torch.ones(4), "b": torch.zeros(2, 2)}, folder / SHARDS[0])
    save_file({"c": torch.full((3,), 7.0)}, folder / SHARDS[1])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return index


def test_reads_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    tensors, files = read_sharded_safetensors(index)
    assert tensors.keys() == {"a", "b", "c"} and len(files) == 2
    assert tensors["c"].file == tmp_path / SHARDS[1]
    assert tensors["c"].data.view("<f4").tolist() == [7.0, 7.0, 7.0]


BAD_INDEXES = {
    "no map": (None, "weight_map"),
    "empty map": ({}, "weight_map"),
    "escape": ({"a": "../model.safetensors"}, "plain name"),
    "absolute": ({"a": "/etc/model.safetensors"}, "plain name"),
    "subfolder": ({"a": "x/model.safetensors"}, "plain name"),
    "nul": ({"a": "a\0.safetensors"}, "plain name"),
    "newline": ({"a": "a.safetensors\n"}, "plain name"),
    "not text": ({"a": 7}, "plain name"),
    "pickle": ({"a": "pytorch_model.bin"}, "plain name"),
    "missing shard": ({"a": "other.safetensors"}, "shard is missing"),
    "missing tensor": (
        {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]},
        "'d' is missing",
    ),
    "tensor elsewhere": ({"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}, "holds tensor 'b'"),
    "tensor not listed": ({"a": SHARDS[0], "b": SHARDS[0]} | {"x": SHARDS[1]}, "holds tensor 'c'"),
}


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_refuses_index(name: str, tmp_path: Path) -> None:
    weight_map, message = BAD_INDEXES[name]
    index = write_shards(tmp_path, weight_map)
    with pytest.raises(CheckpointError) as error:
        read_sharded_safetensors(index)
    assert message in str(error.value)


def test_refuses_a_tensor_in_two_shards(tmp_path: Path) -> None:
    index = write_shards(tmp_path, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
    save_file({"a": torch.ones(4), "c": torch.ones(3)}, tmp_path / SHARDS[1])
    with pytest.raises(CheckpointError, match="holds tensor 'a'"):
        read_sharded_safetensors(index)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """(scratch path, bytes of a good file, its header's length)."""
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    tensors = {
        "norm": torch.ones(7),
        "weight": torch.arange(15, dtype=torch.float32).view(3, 5).bfloat16(),
        "half": torch.ones(2, 2, dtype=torch.float16),
        "empty": torch.zeros(0),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    data = path.read_bytes()
    return path, data, 8 + int.from_bytes(data[:8], "little")


def test_every_truncation_is_refused(sample: tuple[Path, bytes, int]) -> None:
    path, data, _ = sample
    for length in range(len(data)):
        assert not opens_or_refuses(path, data[:length], read_safetensors), length
    assert opens_or_refuses(path, data, read_safetensors)


def test_every_damaged_header_byte_gives_a_clean_error(sample: tuple[Path, bytes, int]) -> None:
    path, data, header_bytes = sample
    for position in range(header_bytes):
        for byte in (0, 255, data[position] ^ 1, ord('"'), ord("9"), ord("["), ord("-")):
            damaged = data[:position] + bytes([byte]) + data[position + 1 :]
            opens_or_refuses(path, damaged, read_safetensors)
    for number in INTERESTING:
        opens_or_refuses(path, number.to_bytes(8, "little") + data[8:], read_safetensors)


def test_fuzzed_files_give_clean_errors(sample: tuple[Path, bytes, int]) -> None:
    path, data, header_bytes = sample

    @settings(max_examples=2000, derandomize=True, deadline=2000, database=None)
    @given(mutated(data, header_bytes))
    def check(damaged: bytes) -> None:
        opens_or_refuses(path, damaged, read_safetensors)

    check()
