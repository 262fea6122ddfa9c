"""A tensor as it lies in a checkpoint file: named, typed, not yet decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class TensorSource:
    """A zero-copy view of one tensor of a mapped checkpoint file.

    Attributes:
        name: the tensor's name; inside a `Checkpoint` the canonical one.
        dtype: element format: "F32", "F16", "BF16", or a GGUF block format such as "Q4_K". Files
            may hold other safetensors types ("I64", "BOOL", ...), a `Checkpoint` never does.
        shape: row-major, for a weight (out, in). Blocks never cross a row.
        data: the raw little-endian bytes, [bytes], uint8, read-only, on the file's map (`file`).
        file: the file that holds it; None for a tensor that was converted and is in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    file: Path | None

    def rows(self, begin: int, end: int, name: str) -> TensorSource:
        """Rows `begin` to `end` (exclusive) of the first dimension, zero-copy, under a new name."""
        row_bytes = self.data.nbytes // self.shape[0]
        return TensorSource(
            name=name,
            dtype=self.dtype,
            shape=(end - begin, *self.shape[1:]),
            data=self.data[begin * row_bytes : end * row_bytes],
            file=self.file,
        )
