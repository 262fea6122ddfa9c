"""The errors that users of the package see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CheckpointError(ValueError):
    """A model cannot be found, read or used; the message is one line that names what is wrong."""


def quoted(value: object, limit: int = 100) -> str:
    """`repr` of an untrusted value for an error message: printable, one line, at most `limit` long.

    Only the beginning of a long string is looked at, so a hostile file cannot make it expensive.
    """
    if isinstance(value, (str, bytes)) and len(value) > limit:
        value = value[:limit]
        return repr(value)[: limit - 3] + "..."
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # Python refuses to print integers of more than 4300 digits.
        return f"a {type(value).__name__} too large to print"
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Put the file's name in front of a `CheckpointError` raised inside."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
