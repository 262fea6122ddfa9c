"""A vocabulary as flat arrays, which work where a file is mapped: nothing is built to use it.

`tiktoken` needs some 0.3 s and 70 MB to set up its merge engine, for the first prompt as much as
for a million. `encode_short` does without: it splits by the standard library's `re` and finds
tokens by bisection, which takes about a millisecond for a usual prompt.
"""

from __future__ import annotations

import bisect
import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from qwen_native.errors import CheckpointError

MAX_SHORT = 4096
"""Characters up to which `encode_short` tries."""

_MAX_MERGED_BYTES = 96  # of a piece that is no token: merging takes quadratic time
_NO_RANK = 0xFFFFFFFF
_MAX_RANK = 1 << 22

# The tokenizer's SPLIT_PATTERN for text in which every character beyond ASCII has been replaced by
# one of ASCII that the pattern treats alike (`_Classes`).
_SPLIT = re.compile(
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]"
    r"| ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)
_SPACES = frozenset("\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | set(
    map(chr, range(0x2000, 0x200B))
)
_UNASSIGNED = "\uffff"


class _Classes(dict[int, str]):
    """For `str.translate`: the ASCII character that stands for a code point in `_SPLIT`."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if code < 128 or category == "Cn":
            # Another Unicode version may know what this one does not.
            replacement = char if code < 128 else _UNASSIGNED
        elif char in _SPACES:
            replacement = "\t"
        elif char == "\u017f":  # the long s is an s where case is ignored
            replacement = "s"
        else:
            replacement = {"L": "x", "N": "0"}.get(category[0], "!")
        self[code] = replacement
        return replacement


_CLASSES = _Classes()


class TokenTable(Sequence[bytes]):
    """The bytes of every token by id, and which tokens merging can make.

    Attributes:
        texts: the bytes of all ordinary tokens, one after the other.
        offsets: [ids + 1] uint32; token i is `texts[offsets[i] : offsets[i + 1]]`, empty for ids
            that are no ordinary token.
        order: [ranked] uint32, the ids of the tokens that merging can make, by their bytes.
        ranks: [ids] uint32, the merge rank of each, or None where rank and id are the same.
    """

    def __init__(
        self,
        texts: npt.NDArray[np.uint8],
        offsets: npt.NDArray[np.uint32],
        order: npt.NDArray[np.uint32],
        ranks: npt.NDArray[np.uint32] | None,
    ) -> None:
        """Check the arrays against each other.

        Raises:
            CheckpointError: an index reaches outside, an id or a rank occurs twice, or a single
                byte has no token.
        """
        if offsets.size == 0 or offsets[0] != 0 or offsets[-1] != texts.size:
            raise CheckpointError(f"token offsets do not span the {texts.size} bytes of the texts")
        if bool(np.any(offsets[1:] < offsets[:-1])):
            raise CheckpointError("token offsets decrease")
        if order.size and int(order.max()) >= offsets.size - 1:
            raise CheckpointError(
                f"token order names id {order.max()}, expected less than {offsets.size - 1}"
            )
        if ranks is not None and ranks.size != offsets.size - 1:
            raise CheckpointError(f"{ranks.size} token ranks, expected {offsets.size - 1}")
        numbers = order if ranks is None else ranks[order]
        if order.size and (int(numbers.max()) >= _MAX_RANK or int(np.bincount(numbers).max()) > 1):
            raise CheckpointError("two tokens have one merge rank, or one has none")
        single = order[offsets[order + 1] - offsets[order] == 1]
        if len(set(texts[offsets[single]].tolist())) < 256:
            raise CheckpointError("a single byte has no token, expected one for all 256")
        self.texts, self.offsets, self.order, self.ranks = texts, offsets, order, ranks
        # Indexing a memoryview is several times faster than indexing an array.
        self._texts, self._offsets = texts.data, offsets.data
        self._order = order.data
        self._ranks = None if ranks is None else ranks.data

    @classmethod
    def build(
        cls,
        tokens: Sequence[bytes],
        ranks: Mapping[bytes, int],
        rank_to_id: Sequence[int] | None,
    ) -> TokenTable:
        """Lay out a vocabulary.

        Args:
            tokens: Bytes of each id, empty where there is no ordinary token.
            ranks: Merge rank of each token that merging can make.
            rank_to_id: Id of each rank, or None where they are the same.
        """
        offsets = np.zeros(len(tokens) + 1, np.uint32)
        np.cumsum(np.fromiter(map(len, tokens), np.uint32, len(tokens)), out=offsets[1:])
        ordered = sorted(ranks)
        order = np.fromiter(map(ranks.__getitem__, ordered), np.uint32, len(ordered))
        by_id = None
        if rank_to_id is not None:
            by_id = np.full(len(tokens), _NO_RANK, np.uint32)
            by_id[rank_to_id] = np.arange(len(rank_to_id), dtype=np.uint32)
            order = np.asarray(rank_to_id, np.uint32)[order]
        return cls(np.frombuffer(b"".join(tokens), np.uint8), offsets, order, by_id)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bytes(self._texts[self._offsets[index] : self._offsets[index + 1]])

    def find(self, token: bytes) -> int | None:
        """Return the id of a token that merging can make, or None."""
        place = bisect.bisect_left(self._order, token, key=self.__getitem__)
        if place < len(self._order) and self[found := self._order[place]] == token:
            return found
        return None

    def rank(self, index: int) -> int:
        """Return the merge rank of a token that has one."""
        return index if self._ranks is None else self._ranks[index]

    def rank_dict(self) -> dict[bytes, int]:
        """Return the rank of every token that merging can make, as `tiktoken` wants them."""
        return {self[index]: self.rank(index) for index in self._order}

    def rank_to_id(self) -> list[int] | None:
        """Return the id of each rank, or None where they are the same."""
        if self.ranks is None:
            return None
        return [index for _, index in sorted((self.rank(index), index) for index in self._order)]


class Overlay(Sequence[bytes]):
    """A table in which some ids have other bytes."""

    def __init__(self, table: Sequence[bytes], changed: Mapping[int, bytes], size: int) -> None:
        self._table, self._changed, self._size = table, changed, size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(index)
        changed = self._changed.get(index)
        if changed is not None:
            return changed
        return self._table[index] if index < len(self._table) else b""


def encode_short(table: TokenTable, text: str) -> list[int] | None:
    """Encode ordinary, normalised text; None when it is not short or simple enough for this way.

    The ids are those of `tiktoken` with the same ranks.
    """
    if len(text) > MAX_SHORT:
        return None
    classes = text if text.isascii() else text.translate(_CLASSES)
    if _UNASSIGNED in classes:
        return None
    ids: list[int] = []
    for match in _SPLIT.finditer(classes):
        piece = text[match.start() : match.end()].encode()
        whole = table.find(piece)
        if whole is not None:
            ids.append(whole)
        elif len(piece) > _MAX_MERGED_BYTES:
            return None
        else:
            merged = _merge(table, piece)
            if merged is None:
                return None
            ids += merged
    return ids


def _merge(table: TokenTable, piece: bytes) -> list[int] | None:
    """Merge the pair of lowest rank, the first of equals, until no pair is a token."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    pairs = [table.find(a + b) for a, b in itertools.pairwise(parts)]
    while True:
        ranked = [(table.rank(pair), i) for i, pair in enumerate(pairs) if pair is not None]
        if not ranked:
            break
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]
        if i > 0:
            pairs[i - 1] = table.find(parts[i - 1] + parts[i])
        if i < len(pairs):
            pairs[i] = table.find(parts[i] + parts[i + 1])
    ids = [table.find(part) for part in parts]
    return None if None in ids else [index for index in ids if index is not None]
