"""The errors that users of the package see."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A model cannot be found, read or used; the message is one line that names what is wrong."""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def quoted(value: object) -> str:
    """Untrusted value for an error message: printable, on one line, at most some 100 characters.

    Only the beginning of long values is looked at, so that a hostile file cannot make it expensive.
    """
    if isinstance(value, bytes):
        value = value[:100]
    try:
        text = _SHORT.repr(value)
    except ValueError:
        # Python refuses to print integers of more than 4300 digits.
        return "a number of more than 4300 digits"
    text = re.sub(r"\s*\n\s*", " ", text)
    return text if len(text) <= 100 else text[:97] + "..."


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Put the file's name in front of a `CheckpointError` raised inside."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
