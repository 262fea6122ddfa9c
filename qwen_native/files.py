"""Reading files that may be damaged or hostile: bounded reads, strict JSON, read-only maps; and
flushing what was written."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from qwen_native.errors import CheckpointError, quoted

_FAULT_AROUND = 1 << 16  # fault_around_bytes of Linux


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    Raises:
        CheckpointError: the file does not exist, cannot be read, or is not a regular file (opening
            a pipe would otherwise wait for ever).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path}: cannot be opened: {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a regular file")
    return descriptor


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        CheckpointError: the file cannot be read or is larger than `limit`.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{path}: has {size} bytes, expected at most {limit}")
        try:
            return file.read(size)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def read_text(path: Path, limit: int) -> str:
    """Return the content of a UTF-8 file of at most `limit` bytes.

    Raises:
        CheckpointError: the file cannot be read, is too large or is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is not UTF-8 at byte {error.start}") from error


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; `where` starts every error message.

    Stricter than `json.loads`: UTF-8 only, no repeated keys, no NaN or Infinity.

    Raises:
        CheckpointError: not valid JSON, or something else than an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(f"{where}: key {quoted(key)} occurs more than once")
            result[key] = value
        return result

    def constant(name: str) -> NoReturn:
        raise CheckpointError(f"{where}: contains {name}, which is not JSON")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is a JSON {type(value).__name__}, expected an object")
    return value


def read_json_object(path: Path, limit: int) -> dict[str, Any]:
    """Read a file of at most `limit` bytes that holds one JSON object.

    Raises:
        CheckpointError: as `read_bytes` and `parse_json_object`.
    """
    return parse_json_object(read_bytes(path, limit), str(path))


class MappedFile:
    """A regular file mapped into memory, read-only, for as long as a view of it lives.

    Attributes:
        path: the file.
        buffer: the map, for `struct.unpack_from` and for slices that copy.
        bytes: the whole file as a read-only array, [size], uint8.
        status: size, times and inode when it was opened.
    """

    __slots__ = ("buffer", "bytes", "path", "status")

    def __init__(self, path: Path) -> None:
        """Map `path`.

        Raises:
            CheckpointError: the file cannot be opened or mapped, or is empty.
        """
        self.path = path
        descriptor = open_regular(path)
        try:
            self.status = os.fstat(descriptor)
            size = self.status.st_size
            if size == 0:
                raise CheckpointError(f"{path}: is empty")
            self.buffer = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self.buffer, dtype=np.uint8)

    def release(self, view: npt.NDArray[np.uint8]) -> None:
        """Drop the resident pages of `view`, a slice of `bytes`, and of its surroundings.

        The view stays valid; touching it again reads the file again. Up to 64 KB around it go too,
        because the kernel brings in as much around every page that is touched.

        Raises:
            ValueError: `view` is not inside this map.
        """
        begin = view.ctypes.data - self.bytes.ctypes.data
        end = begin + view.nbytes
        if begin < 0 or end > self.bytes.nbytes:
            raise ValueError(f"the view is not part of the map of {self.path}")
        first = begin // _FAULT_AROUND * _FAULT_AROUND
        last = min(-(-end // _FAULT_AROUND) * _FAULT_AROUND, self.bytes.nbytes)
        if last > first:
            self.buffer.madvise(mmap.MADV_DONTNEED, first, last - first)

    def advise(self, begin: int, end: int, advice: int) -> None:
        """Give the kernel a hint on the pages of bytes [begin, end); what it refuses is ignored."""
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            with contextlib.suppress(OSError):
                self.buffer.madvise(advice, first, end - first)


def flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
