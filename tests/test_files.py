"""Bounded reads, strict JSON and maps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from qwen_native.errors import CheckpointError
from qwen_native.files import MappedFile, parse_json_object, read_bytes, read_json_object, read_text


def test_reads_bytes_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(CheckpointError, match="has 5 bytes, expected at most 4"):
        read_bytes(path, 4)


def test_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "missing", "cannot be opened: No such file"),
        (tmp_path, "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "nul\0", "cannot be opened"),
        (tmp_path / ("x" * 300), "cannot be opened: File name too long"),
    ]:
        for read in (MappedFile, lambda p: read_bytes(p, 10)):
            with pytest.raises(CheckpointError, match=message):
                read(path)


def test_reads_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("é".encode())
    assert read_text(tmp_path / "a", 10) == "é"
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match="not UTF-8 at byte 2"):
        read_text(tmp_path / "a", 10)


def test_reads_json(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('{"a": [1, 2.5, null, true, "\\u00e9"]}')
    assert read_json_object(tmp_path / "a", 100) == {"a": [1, 2.5, None, True, "é"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "is a JSON list"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": 1, "a": 1}', "'a' occurs more than once"),
        (b'{"x": {"b": 1, "b": 2}}', "'b' occurs more than once"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_refuses_json(text: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        parse_json_object(text, "here")
    assert str(error.value).startswith("here: ") and "\n" not in str(error.value)


def test_map_is_read_only_and_outlives_its_object(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 64)
    view = MappedFile(tmp_path / "a").bytes[256:512]
    assert view.tolist() == list(range(256))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        MappedFile(tmp_path / "a")


@pytest.mark.parametrize("begin", [0, 1, 4095, 4096, 20_000])
@pytest.mark.parametrize("length", [0, 1, 4096, 8192, 20_001])
def test_release_keeps_the_content(begin: int, length: int, tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 40_001, dtype=np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    file = MappedFile(tmp_path / "a")
    file.release(file.bytes[begin : begin + length])
    np.testing.assert_array_equal(file.bytes, data)


def test_release_refuses_other_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(ValueError, match="not part of the map"):
        MappedFile(tmp_path / "a").release(np.zeros(3, np.uint8))
