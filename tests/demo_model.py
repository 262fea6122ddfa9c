"""The demo model's vocabulary, read by a few lines that share no code with the package."""

from __future__ import annotations

import functools
import struct
from pathlib import Path

import pytest

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def demo_path() -> Path:
    """Path of the demo GGUF; skips the test where the extra is not installed."""
    hub = pytest.importorskip("qwen_native.hub")
    try:
        return Path(hub.resolve_model(None))
    except ValueError as error:
        pytest.skip(f"needs the demo extra (pip install '.[demo]'): {error}")


@functools.cache
def demo_metadata() -> dict[str, object]:
    """All metadata of the demo GGUF: strings as str, arrays as lists."""
    data = demo_path().open("rb").read(16 << 20)
    position = 24
    (pairs,) = struct.unpack_from("<Q", data, 16)

    def take(layout: str) -> object:
        nonlocal position
        (value,) = struct.unpack_from("<" + layout, data, position)
        position += struct.calcsize("<" + layout)
        return value

    def text() -> str:
        nonlocal position
        (length,) = struct.unpack_from("<Q", data, position)
        position += 8 + length
        return data[position - length : position].decode()

    def value(kind: object) -> object:
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return take(_SCALARS[kind])

    return {text(): value(take("I")) for _ in range(pairs)}
