"""Tokenised documents in memory-mapped shards, and the endless stream that pretraining reads.

A folder of shards has `tokens-00000.bin` ... (little-endian uint16 or uint32), `ends.npy` (int64:
where each document ends in the concatenation of all shards) and `meta.json`, written last. Every
document ends with `<|endoftext|>`; none crosses a shard.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from qwen_native.tokenizer import Tokenizer
from qwen_native.train.records import Report

_SHARD_TOKENS = 1 << 28


def fingerprint(tokenizer: Tokenizer) -> str:
    """Tells vocabularies apart: shards made with another one are refused."""
    digest = hashlib.sha256()
    for index in range(tokenizer.vocab_size):
        try:
            digest.update(tokenizer.token_bytes(index) + b"\n")
        except ValueError:
            digest.update(b"\n")
    return digest.hexdigest()[:16]


def write_shards(
    folder: Path,
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    report: Report,
    shard_tokens: int = _SHARD_TOKENS,
) -> Shards:
    """Tokenise documents into a new folder, which appears whole or not at all.

    Args:
        folder: must not exist.
        texts: (where it is from, text) of each document, as `read_texts` yields them.
        tokenizer: text is ordinary text: special tokens that it spells are not recognised.
        report: of the reader; its counts go into meta.json.
        shard_tokens: about how many tokens a shard holds.

    Raises:
        ValueError: the folder exists, or there is no document.
    """
    if folder.exists():
        raise ValueError(f"{folder}: exists already, expected a new folder for the token shards")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    aside.mkdir(parents=True)
    wide = tokenizer.vocab_size > 1 << 16
    dtype = np.dtype("<u4" if wide else "<u2")
    ends: list[int] = []
    sizes: list[int] = []
    file: BinaryIO | None = None
    try:
        total = 0
        for _, text in texts:
            ids = np.array([*tokenizer.encode(text), tokenizer.eod], dtype=dtype)
            if file is None or sizes[-1] + len(ids) > shard_tokens:
                if file is not None:
                    _close(file)
                file = (aside / f"tokens-{len(sizes):05d}.bin").open("wb")
                sizes.append(0)
            file.write(ids.tobytes())
            total += len(ids)
            sizes[-1] += len(ids)
            ends.append(total)
        if file is None:
            raise ValueError(f"no document to train on. {report.summary()}".strip())
        _close(file)
        np.save(aside / "ends.npy", np.array(ends, dtype=np.int64))
        meta = {
            "dtype": dtype.str,
            "shard_tokens": sizes,
            "documents": len(ends),
            "tokens": total,
            "malformed_records": report.malformed,
            "tokenizer": fingerprint(tokenizer),
            "end_of_document": tokenizer.eod,
        }
        (aside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return Shards(folder)


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class Shards:
    """A folder of token shards, mapped.

    Attributes:
        meta: what meta.json says.
        ends: [documents], int64: where each document ends in all shards together.
    """

    def __init__(self, folder: Path) -> None:
        """Map a folder.

        Raises:
            ValueError: it is no folder of shards, or its files do not fit together.
        """
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_bytes())
            self.ends: npt.NDArray[np.int64] = np.load(folder / "ends.npy", allow_pickle=False)
            sizes = [int(size) for size in self.meta["shard_tokens"]]
            self._shards = [
                np.memmap(folder / f"tokens-{i:05d}.bin", dtype=self.meta["dtype"], mode="r")
                for i in range(len(sizes))
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: is no folder of token shards: {error}") from error
        begins = np.cumsum([0, *sizes])
        fits = [len(shard) for shard in self._shards] == sizes
        grows = len(self.ends) > 0 and self.ends[0] > 0 and bool((np.diff(self.ends) > 0).all())
        if not fits or not grows or self.ends[-1] != begins[-1]:
            raise ValueError(f"{folder}: token shards are damaged: sizes differ from meta.json")
        self._begins = begins

    @property
    def tokens(self) -> int:
        return int(self.ends[-1])

    @property
    def documents(self) -> int:
        return len(self.ends)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError when the shards were made with another vocabulary."""
        if self.meta.get("tokenizer") != fingerprint(tokenizer):
            raise ValueError("the token shards were made with another tokenizer than the model's")

    def read(self, document: int, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Tokens [begin, end) of one document."""
        start = int(self.ends[document - 1]) if document else 0
        shard = int(np.searchsorted(self._begins, start, side="right")) - 1
        offset = start - int(self._begins[shard])
        return np.asarray(self._shards[shard][offset + begin : offset + end], dtype=np.int64)


@dataclass(frozen=True)
class Piece:
    """A part of one document in the stream; `ends_document` when it includes the end."""

    tokens: npt.NDArray[np.int64]
    ends_document: bool


class DocumentStream:
    """All documents of some shards one after another, shuffled anew in each epoch, without end.

    A pure function of (shards, seed): any range can be read at any time, so that the position of a
    training run is one number.
    """

    def __init__(self, shards: Shards, seed: int) -> None:
        self.shards = shards
        self.seed = seed
        self._order = functools.lru_cache(maxsize=2)(self._compute_order)

    def _compute_order(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The documents of an epoch in their order, and where each ends in the epoch."""
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.shards.documents)
        lengths = np.diff(self.shards.ends, prepend=0)
        return order, np.cumsum(lengths[order])

    def read(self, begin: int, end: int) -> list[Piece]:
        """The pieces of documents that make up tokens [begin, end) of the stream."""
        pieces = []
        while begin < end:
            epoch, within = divmod(begin, self.shards.tokens)
            order, ends = self._order(epoch)
            place = int(np.searchsorted(ends, within, side="right"))
            start = int(ends[place - 1]) if place else 0
            count = min(int(ends[place]) - within, end - begin)
            offset = within - start
            tokens = self.shards.read(int(order[place]), offset, offset + count)
            pieces.append(Piece(tokens, within + count == int(ends[place])))
            begin += count
        return pieces
