"""Typed access to the untrusted keys of a config.json or of GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from qwen_native.errors import CheckpointError, quoted

_MAX_INTEGER = 1 << 40
"""Above every field's own limit, low enough that products and quotients stay ordinary numbers."""

_T = TypeVar("_T")


class Fields:
    """Reads keys with their types checked; an error names the key as the file spells it.

    Several names are spellings of one field, the first that is there counts. A null counts as
    absent, as in transformers.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Read keys that all begin with `prefix`, which the callers then leave out."""
        self._values = values
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._values

    def get(self, *names: str) -> Any:
        """The raw value, or None."""
        for name in names:
            value = self._values.get(self._prefix + name)
            if value is not None:
                return value
        return None

    def optional_integer(self, *names: str) -> int | None:
        value = self.get(*names)
        if value is not None and (type(value) is not int or not 0 <= value < _MAX_INTEGER):
            raise self._wrong(names, "a whole number of ordinary size")
        return value

    def optional_number(self, *names: str) -> float | None:
        value = self.get(*names)
        if value is None:
            return None
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise self._wrong(names, "a finite number")
        return float(value)

    def integer(self, *names: str, default: int | None = None) -> int:
        """A whole number; without a default the key is required."""
        return self._required(self.optional_integer(*names), default, names)

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number; without a default the key is required."""
        return self._required(self.optional_number(*names), default, names)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        value = self.get(*names)
        if value is not None and type(value) is not bool:
            raise self._wrong(names, "true or false")
        return self._required(value, default, names)

    def text(self, *names: str, default: str | None = None) -> str:
        value = self.get(*names)
        if value is not None and type(value) is not str:
            raise self._wrong(names, "a string")
        return self._required(value, default, names)

    def require(self, allowed: Mapping[str, tuple[bool | float | str, ...]]) -> None:
        """Refuse a key whose value asks for something that the engine does not do."""
        for name, values in allowed.items():
            value = self.get(name)
            scalar = type(value) in (bool, int, float, str)
            if value is not None and not (scalar and value in values):
                expected = " or ".join(map(repr, values)) or "it to be absent"
                raise CheckpointError(
                    f"{self._prefix}{name} is {quoted(value)}, which is not supported; "
                    f"expected {expected}"
                )

    def _required(self, value: _T | None, default: _T | None, names: tuple[str, ...]) -> _T:
        result = default if value is None else value
        if result is None:
            raise CheckpointError(f"{self._prefix}{' or '.join(names)} is missing")
        return result

    def _wrong(self, names: tuple[str, ...], expected: str) -> CheckpointError:
        present = next(n for n in names if self._values.get(self._prefix + n) is not None)
        value = self._values[self._prefix + present]
        return CheckpointError(f"{self._prefix}{present} is {quoted(value)}, expected {expected}")


def unknown_architecture(key: str, value: str, known: tuple[str, ...]) -> CheckpointError:
    """The error for a model type that the engine does not have."""
    if "moe" in value:
        return CheckpointError(
            f"{key} is {quoted(value)}: mixture-of-experts models are not supported"
        )
    return CheckpointError(f"{key} is {quoted(value)}, expected one of {', '.join(known)}")


def head_width(hidden_size: int, num_heads: int) -> int:
    """head_dim of a model that does not state it: hidden_size / num_heads."""
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(
            f"hidden size is {hidden_size}, expected a multiple of the number of heads {num_heads}"
        )
    return hidden_size // num_heads


def branch_width(fields: Fields, *names: str) -> int:
    """Width of one SwiGLU branch of Qwen-1, whose files state both branches together."""
    both = fields.integer(*names)
    if both % 2:
        raise CheckpointError(f"{' or '.join(names)} is {both}, expected an even number")
    return both // 2
