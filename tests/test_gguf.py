"""The GGUF reader against files written and read by the gguf package, and against lies."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from mutations import INTERESTING, mutated, opens_or_refuses

from qwen_native.errors import CheckpointError
from qwen_native.gguf import _TENSOR_TYPES, BLOCKS, LazyStrings, read_gguf

TOKENS = [b"!", b"\xff\xfe", "é".encode(), b"", b"token " * 9]
MERGES = [b"a b", b"ab c", b"x y"]


def add_tensors(writer: GGUFWriter, rng: np.random.Generator) -> dict[str, bytes]:
    """One tensor of every supported type and of one to four dimensions; their bytes by name."""
    contents = {}
    shapes = [(256,), (3, 256), (2, 3, 512), (1, 2, 3, 256)]
    for i, dtype in enumerate(BLOCKS):
        shape = shapes[i % len(shapes)]
        block, block_bytes = BLOCKS[dtype]
        row_bytes = shape[-1] // block * block_bytes
        raw = rng.integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)
        name = f"tensor.{dtype}"
        contents[name] = raw.tobytes()
        if dtype in ("F32", "F16"):
            values = raw.view(np.float32 if dtype == "F32" else np.float16)
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[dtype])
    return contents


def write_sample(path: Path, alignment: int = 32) -> dict[str, bytes]:
    writer = GGUFWriter(path, "qwen2")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_uint64("u64", 1 << 63)
    writer.add_int64("i64", -(1 << 62))
    writer.add_float32("f32", 0.1)
    writer.add_float64("f64", 0.1)
    writer.add_bool("yes", True)
    writer.add_bool("no", False)
    writer.add_string("text", "naïve ☃")
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("bools", [True, False, True])
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    writer.add_array("tokenizer.ggml.merges", MERGES)
    contents = add_tensors(writer, np.random.default_rng(1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return contents


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: str = "a", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, n_dims: int = -1
) -> bytes:
    count = len(dims) if n_dims < 0 else n_dims
    numbers = struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)
    return text(name) + numbers


def build(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    counts = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_reads_what_the_gguf_package_writes(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    contents = write_sample(path, alignment)
    metadata, tensors, file = read_gguf(path)

    assert metadata["u8"] == 200 and metadata["i8"] == -100
    assert metadata["u16"] == 60_000 and metadata["i16"] == -30_000
    assert metadata["u32"] == 4_000_000_000 and metadata["i32"] == -2_000_000_000
    assert metadata["u64"] == 1 << 63 and metadata["i64"] == -(1 << 62)
    assert metadata["f32"] == np.float32(0.1) and metadata["f64"] == 0.1
    assert metadata["yes"] is True and metadata["no"] is False
    assert metadata["text"] == "naïve ☃"
    assert metadata["ints"].tolist() == [1, -2, 3]
    assert metadata["floats"].tolist() == [0.5, 1.5]
    assert metadata["bools"].tolist() == [True, False, True]
    assert metadata["tokenizer.ggml.tokens"] == TOKENS

    assert tensors.keys() == contents.keys()
    truth = {t.name: t for t in GGUFReader(path).tensors}
    for name, raw in contents.items():
        mine = tensors[name]
        assert mine.data.tobytes() == raw
        assert mine.shape == tuple(int(n) for n in truth[name].shape)[::-1]
        assert mine.dtype == truth[name].tensor_type.name
        assert not mine.data.flags.writeable and np.shares_memory(mine.data, file.bytes)


def test_decodes_merges_on_demand(tmp_path: Path) -> None:
    write_sample(tmp_path / "a.gguf")
    merges = read_gguf(tmp_path / "a.gguf")[0]["tokenizer.ggml.merges"]
    assert isinstance(merges, LazyStrings)
    assert len(merges) == 3 and list(merges) == MERGES
    assert merges[1] == MERGES[1] and merges[1:] == MERGES[1:]


def test_types_agree_with_the_gguf_package() -> None:
    for number, name in _TENSOR_TYPES.items():
        assert GGMLQuantizationType(number).name == name
    for name, sizes in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]] == sizes
    supported = set(BLOCKS)
    assert supported == {
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0",
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    }  # fmt: skip


def test_reads_version_2_and_nested_arrays(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", GGUFValueType.UINT8, 2) + b"\x01\x02"
    nested = struct.pack("<IQ", GGUFValueType.ARRAY, 2) + inner + inner
    empty = struct.pack("<IQ", GGUFValueType.INT32, 0)
    data = build((pair("n", 9, nested), pair("e", 9, empty)), (tensor(),), bytes(16), version=2)
    metadata, tensors, _ = read_gguf(write(tmp_path / "a.gguf", data))
    assert [part.tolist() for part in metadata["n"]] == [[1, 2], [1, 2]]
    assert metadata["e"].tolist() == []
    assert tensors["a"].shape == (4,)


def deep(levels: int) -> bytes:
    return struct.pack("<IQ", 9, 1) * levels + struct.pack("<IQ", 0, 0)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


HUGE = (1 << 64) - 1
UNSUPPORTED = [t for t in _TENSOR_TYPES.values() if t not in BLOCKS]
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty"),
    "magic only": (b"GGUF", "version needs 4 bytes"),
    "other magic": (b"GGML" + bytes(100), "begins with b'GGML'"),
    "version 1": (build(version=1), "version is 1"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    "pair count": (build(counts=(0, HUGE)), "metadata count"),
    "tensor count": (build(counts=(HUGE, 0)), "tensor count"),
    "long key": (build((struct.pack("<Q", HUGE),), counts=(0, 1)) + bytes(64), "metadata key has"),
    "key not utf-8": (build((pair(b"\xff", 0, b"\0"),)), "not UTF-8"),
    "repeated key": (build((pair("k", 0, b"\1"), pair("k", 0, b"\1"))), "'k' occurs more"),
    "value type": (build((pair("k", 13, b"\0"),)), "'k' has type 13"),
    "array type": (build((pair("k", 9, array(99, 1)),)), "array of type 99"),
    "boolean": (build((pair("k", 7, b"\2"),)), "is 2, expected 0 or 1"),
    "booleans": (build((pair("k", 9, array(7, 2, b"\1\3")),)), "holds 3"),
    "string length": (build((pair("k", 8, struct.pack("<Q", HUGE)),)), "value of 'k' needs"),
    "array count": (build((pair("k", 9, array(4, HUGE)),)), "'k' count is"),
    "string count": (build((pair("k", 9, array(8, 1 << 40)),)), "'k' count is"),
    "string in array": (build((pair("k", 9, array(8, 1, struct.pack("<Q", HUGE))),)), "past"),
    "string in merges": (
        build((pair("tokenizer.ggml.merges", 9, array(8, 2, struct.pack("<Q", HUGE) * 2)),)),
        "past the end",
    ),
    "nested array count": (build((pair("k", 9, array(9, 1 << 40)),)), "'k' count is"),
    "deep array": (build((pair("k", 9, deep(1000)),)), "nests arrays"),
    "alignment 0": (build((pair("general.alignment", 4, bytes(4)),)), "general.alignment is 0"),
    "alignment 24": (
        build((pair("general.alignment", 4, struct.pack("<I", 24)),)),
        "general.alignment is 24",
    ),
    "alignment text": (build((pair("general.alignment", 8, text("32")),)), "alignment is '32'"),
    "repeated tensor": (build(tensors=(tensor(), tensor(offset=32)), data=bytes(64)), "'a' occurs"),
    "no dimension": (build(tensors=(tensor(dims=()),), data=bytes(64)), "0 dimensions"),
    "five dimensions": (build(tensors=(tensor(dims=(1,) * 5),), data=bytes(64)), "5 dimensions"),
    "dimension count": (build(tensors=(tensor(n_dims=1 << 31),), data=bytes(64)), "dimensions"),
    "empty dimension": (build(tensors=(tensor(dims=(4, 0)),), data=bytes(64)), "shape (0, 4)"),
    "overflow": (build(tensors=(tensor(dims=(1 << 32, 1 << 32)),), data=bytes(64)), "needs bytes"),
    "huge dims": (build(tensors=(tensor(dims=(HUGE,) * 4),), data=bytes(64)), "needs bytes"),
    "partial block": (build(tensors=(tensor(dims=(48,), kind=2),), data=bytes(64)), "rows of 48"),
    "offset unaligned": (build(tensors=(tensor(offset=8),), data=bytes(64)), "offset 8"),
    "offset past end": (build(tensors=(tensor(offset=64),), data=bytes(64)), "truncated"),
    "huge offset": (build(tensors=(tensor(offset=HUGE - 31),), data=bytes(64)), "truncated"),
    "data truncated": (build(tensors=(tensor(),), data=bytes(15)), "truncated"),
    "overlap": (
        build(tensors=(tensor(dims=(16,)), tensor("b", offset=32)), data=bytes(96)),
        "'a' and 'b' overlap",
    ),
    "same place": (build(tensors=(tensor(), tensor("b")), data=bytes(96)), "overlap"),
    "unknown type": (build(tensors=(tensor(kind=999),), data=bytes(64)), "number 999"),
}
for _type in UNSUPPORTED:
    _number = GGMLQuantizationType[_type].value
    BAD_FILES[f"type {_type}"] = (
        build(tensors=(tensor("some.weight", (256,), _number),), data=bytes(4096)),
        f"tensor 'some.weight' has the unsupported type {_type}",
    )


@pytest.mark.parametrize("name", BAD_FILES)
def test_refuses(name: str, tmp_path: Path) -> None:
    data, message = BAD_FILES[name]
    path = write(tmp_path / "a.gguf", data)
    with pytest.raises(CheckpointError) as error:
        read_gguf(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """(scratch path, bytes of a good file with every tensor type, its header's length)."""
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    write_sample(path)
    data = path.read_bytes()
    header_bytes = min(int(t.data_offset) for t in GGUFReader(path).tensors)
    return path, data, header_bytes


def read_all(path: Path) -> None:
    """Reads the file and everything that is decoded only on demand."""
    metadata, tensors, _ = read_gguf(path)
    for value in metadata.values():
        if isinstance(value, LazyStrings):
            list(value)
    for source in tensors.values():
        source.data.sum()


def test_every_truncation_is_refused(sample: tuple[Path, bytes, int]) -> None:
    path, data, header_bytes = sample
    last = len(data.rstrip(b"\0"))
    for length in [*range(header_bytes), *range(header_bytes, last, 97)]:
        assert not opens_or_refuses(path, data[:length], read_all), length
    assert opens_or_refuses(path, data, read_all)


def test_every_lying_number_gives_a_clean_error(sample: tuple[Path, bytes, int]) -> None:
    path, data, header_bytes = sample
    for position in range(header_bytes - 8):
        for number in INTERESTING[position % 3 :: 3]:
            lie = number.to_bytes(8, "little")
            opens_or_refuses(path, data[:position] + lie + data[position + 8 :], read_all)


def test_fuzzed_files_give_clean_errors(sample: tuple[Path, bytes, int]) -> None:
    path, data, header_bytes = sample

    @settings(max_examples=3000, derandomize=True, deadline=2000, database=None)
    @given(mutated(data, header_bytes))
    def check(damaged: bytes) -> None:
        opens_or_refuses(path, damaged, read_all)

    check()


def test_reads_a_full_vocabulary_fast(tmp_path: Path) -> None:
    """0.25 s is a sixth of the time that a cold start may take until the first token."""
    writer = GGUFWriter(tmp_path / "a.gguf", "qwen2")
    words = [f"token{i}".encode() for i in range(151_936)]
    writer.add_array("tokenizer.ggml.tokens", words)
    writer.add_array("tokenizer.ggml.merges", [b"ab " + word for word in words[:151_387]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    times = []
    for _ in range(5):
        start = time.process_time()
        metadata: dict[str, Any] = read_gguf(tmp_path / "a.gguf")[0]
        times.append(time.process_time() - start)
    assert metadata["tokenizer.ggml.tokens"] == words
    assert min(times) < 0.25
