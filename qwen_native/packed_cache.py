"""Packed files beside the cache: made once for every source and choice of weights, then mapped.

A file is used while its source is the one it was made from, this version would give its tensors the
same formats, and its content is known to be intact: it was checked, and nothing has touched it
since. Whatever fails that is made anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_native import _C
from qwen_native.checkpoint import Checkpoint
from qwen_native.errors import CheckpointError
from qwen_native.files import open_regular, read_json_object
from qwen_native.hub import cache_folder, file_lock
from qwen_native.packed import PackedFile, PackedTensor, Progress, write
from qwen_native.tensor_source import TensorSource
from qwen_native.tokenizer import Tokenizer

_HEAD_BYTES = 1 << 16
_PACK_BYTES = 4 << 20  # of a source tensor that are packed at once
_ROW_MULTIPLE = 256  # of every format's panel, so that packed blocks simply follow each other
_SPARE_BYTES = 64 << 20  # of the disk that stay free
_SOURCE_SUFFIXES = {".json", ".safetensors", ".txt", ".tiktoken", ".jinja"}


def cache_is_enabled() -> bool:
    """Whether QN_PACKED_CACHE allows packed files to be kept (default) or is "0"."""
    return os.environ.get("QN_PACKED_CACHE", "1") != "0"


def open_packed(path: Path, threads: int) -> PackedFile:
    """Open a packed file that the user names, and check all of it unless that has been done.

    Raises:
        CheckpointError: it is damaged, or made by another version.
    """
    file = PackedFile(path)
    _ensure_intact(file, threads)
    return file


def find_packed(path: Path, weights: str, threads: int) -> PackedFile | None:
    """Return the packed file of a checkpoint if there is one that may be used."""
    try:
        file = PackedFile(packed_path(path, weights))
        if file.source != source_identity(path) or file.weights != weights:
            return None
        for source, format in file.source_types():
            if _C.chosen_format(weights, source) != format:
                return None
        _ensure_intact(file, threads)
    except (CheckpointError, OSError, ValueError):
        return None
    return file


def make_packed(
    path: Path, checkpoint: Checkpoint, weights: str, threads: int, progress: Progress | None
) -> PackedFile | None:
    """Pack a checkpoint into the cache and open the result.

    Returns:
        None when that would gain nothing, because no matrix gets quantised.

    Raises:
        CheckpointError: the checkpoint changed meanwhile, or cannot be packed.
        OSError: the cache cannot be written, or is too full.
    """
    if not any(_is_quantized(tensor, weights) for tensor in checkpoint.tensors.values()):
        return None
    target = packed_path(path, weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(target.with_name(target.name + ".lock")):
        found = find_packed(path, weights, threads)  # another process may have made it meanwhile
        if found is not None:
            return found
        _remove_leftovers(target)
        identity = source_identity(path)
        write_checkpoint(target, checkpoint, weights, source=identity, progress=progress)
        if source_identity(path) != identity:
            target.unlink()
            raise CheckpointError(f"{path}: was changed while it was read")
        file = PackedFile(target)
        _write_stamp(file)
    return file


def write_checkpoint(
    target: Path,
    checkpoint: Checkpoint,
    weights: str,
    *,
    source: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Pack a checkpoint into a file, block by block, so that neither is ever in memory as a whole.

    Raises:
        CheckpointError, ValueError: a tensor cannot be packed.
        OSError: the file cannot be written; ENOSPC before it is begun when the disk is too full.
    """
    tensors = [_packed(checkpoint, tensor, weights) for tensor in checkpoint.tensors.values()]
    needed = sum(tensor.nbytes for tensor in tensors) + _SPARE_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(f"{needed} bytes are needed, only {free} are free")
    tokenizer = load_tokenizer(checkpoint)
    write(
        target,
        config=checkpoint.config,
        generation_config=checkpoint.generation_config,
        chat_template=checkpoint.chat_template,
        tokenizer=None if tokenizer is None else tokenizer.compact(),
        tensors=tensors,
        weights=weights,
        source=source,
        progress=progress,
    )


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Build the tokenizer of a checkpoint; None when it has none."""
    if checkpoint.kind == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    return Tokenizer.from_folder(checkpoint.path)


def _format(tensor: TensorSource, weights: str) -> str:
    return "f32" if _C.is_vector(tensor.name) else _C.chosen_format(weights, tensor.dtype)


def _is_quantized(tensor: TensorSource, weights: str) -> bool:
    return _format(tensor, weights) not in ("f32", "bf16")


def _packed(checkpoint: Checkpoint, tensor: TensorSource, weights: str) -> PackedTensor:
    format = _format(tensor, weights)
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    cols = tensor.shape[-1]
    row_bytes = tensor.data.nbytes // rows
    step = max(_PACK_BYTES // row_bytes // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE

    def blocks() -> Iterator[npt.NDArray[np.uint8]]:
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            first, last = begin * row_bytes, (begin + count) * row_bytes
            view = tensor.data[first:last]
            yield _C.pack_weight(view, tensor.dtype, count, cols, format).data
            checkpoint.release(tensor, first, last)

    return PackedTensor(tensor.name, format, tensor.shape, blocks, tensor.dtype)


def packed_path(path: Path, weights: str) -> Path:
    """Where the packed file of a checkpoint belongs; the same for every content of that path."""
    absolute = Path(os.path.abspath(path))
    return cache_folder() / "packed" / f"{absolute.stem}-{_key(absolute)}-{weights}.qn"


def _key(path: Path) -> str:
    return f"{_C.checksum(np.frombuffer(os.fsencode(path), np.uint8)):016x}"


def source_identity(path: Path) -> dict[str, Any]:
    """What tells one content of a checkpoint from another without reading all of it.

    Raises:
        CheckpointError, OSError: it cannot be read.
    """
    files: Iterable[Path] = [path]
    if os.path.isdir(path):
        files = sorted(p for p in path.iterdir() if p.suffix in _SOURCE_SUFFIXES and p.is_file())
    return {"path": os.path.abspath(path), "files": [_file_identity(file) for file in files]}


def _file_identity(path: Path) -> dict[str, Any]:
    descriptor = open_regular(path)
    try:
        head = os.pread(descriptor, _HEAD_BYTES, 0)
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return {
        "name": path.name,
        **_status(status),
        "head": f"{_C.checksum(np.frombuffer(head, np.uint8)):016x}",
    }


def _status(status: os.stat_result) -> dict[str, int]:
    """What no change of a file's content leaves as it was."""
    return {
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _stamp_path(file: PackedFile) -> Path:
    name = f"{_key(Path(os.path.abspath(file.path)))}.verified.json"
    return cache_folder() / "packed" / name


def _stamp(file: PackedFile) -> dict[str, Any]:
    # The status is of the time when the file was opened: any change since makes the stamp invalid.
    return {"header": file.header_checksum, **_status(file.status)}


def _ensure_intact(file: PackedFile, threads: int) -> None:
    """Check all of a file unless a stamp says that this has been done and nothing changed since."""
    with contextlib.suppress(CheckpointError, OSError):
        if read_json_object(_stamp_path(file), 1 << 12) == _stamp(file):
            return
    file.verify(threads)
    _write_stamp(file)


def _write_stamp(file: PackedFile) -> None:
    path = _stamp_path(file)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_stamp(file)), encoding="utf-8")
        os.replace(partial, path)
    except OSError:  # then every load checks the whole file
        with contextlib.suppress(OSError):
            partial.unlink()


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left; the lock keeps others from writing now."""
    for partial in target.parent.glob(f"{target.name}.*.partial"):
        with contextlib.suppress(OSError):
            partial.unlink()
