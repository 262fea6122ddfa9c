"""Damages files the way that bad disks, broken downloads and attackers do."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st

from qwen_native.errors import CheckpointError

INTERESTING = (0, 1, 2, 7, 8, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 62, 1 << 63, (1 << 64) - 1)
"""Integers that break careless length, count and offset arithmetic."""


@st.composite
def mutated(draw: st.DrawFn, data: bytes, header_bytes: int) -> bytes:
    """`data` with one to three damages, most of them in its first `header_bytes` bytes."""
    for _ in range(draw(st.integers(1, 3))):
        if not data:
            break
        position = draw(st.integers(0, min(header_bytes, len(data)) - 1))
        kind = draw(st.sampled_from(["truncate", "flip", "number", "insert", "delete", "repeat"]))
        if kind == "truncate":
            data = data[: draw(st.integers(0, len(data) - 1))]
        elif kind == "flip":
            flipped = data[position] ^ (1 << draw(st.integers(0, 7)))
            data = data[:position] + bytes([flipped]) + data[position + 1 :]
        elif kind == "number":
            width = draw(st.sampled_from([1, 4, 8]))
            near = draw(st.sampled_from([*INTERESTING, len(data), len(data) + 1, position]))
            number = (near % (1 << 8 * width)).to_bytes(width, "little")
            data = data[:position] + number + data[position + width :]
        elif kind == "insert":
            data = data[:position] + draw(st.binary(max_size=16)) + data[position:]
        elif kind == "delete":
            data = data[:position] + data[position + draw(st.integers(1, 16)) :]
        else:
            end = position + draw(st.integers(1, 64))
            data = data[:end] + data[position:end] + data[end:]
    return data


@contextmanager
def bounded_memory(limit: int) -> Iterator[None]:
    """Fails when the block allocates more than `limit` bytes at any time."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"allocated {peak} bytes"


def opens_or_refuses(path: Path, data: bytes, read: Callable[[Path], object]) -> bool:
    """Whether `read` accepts the bytes as a file; any error but CheckpointError escapes."""
    # A new inode: earlier maps of the path stay intact.
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    try:
        with bounded_memory(1 << 22):
            read(path)
    except CheckpointError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000, message
        return False
    return True
