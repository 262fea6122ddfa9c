"""Values in error messages stay short, printable and on one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen_native.errors import CheckpointError, located, quoted


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("name", "'name'"),
        ("two\nlines", r"'two\nlines'"),
        (b"\xff", r"b'\xff'"),
        (7, "7"),
        (None, "None"),
        ((3, 4), "(3, 4)"),
        ([10**5000], "a number of more than 4300 digits"),
        (np.zeros((2, 2)), "array([[0., 0.], [0., 0.]])"),
    ],
)
def test_quoted(value: object, expected: str) -> None:
    assert quoted(value) == expected


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, b"x" * 10**7, ["y"] * 10**6, {str(i): i for i in range(10**5)}, np.zeros(10**6)],
    ids=["str", "bytes", "list", "dict", "array"],
)
def test_quoted_is_short_and_on_one_line(value: object) -> None:
    text = quoted(value)
    assert len(text) <= 100 and "\n" not in text


def test_located_names_the_file() -> None:
    with pytest.raises(CheckpointError, match=r"^a/b: wrong$"), located(Path("a/b")):
        raise CheckpointError("wrong")
