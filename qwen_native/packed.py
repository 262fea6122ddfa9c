"""The packed model file `.qn`: weights in the engine's own layout, mapped and used in place.

docs/PACKED_FILE.md describes the format. A file holds everything that is needed to run: the shape,
generation defaults, chat template, vocabulary, and every tensor as the kernels read it.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_native import _C
from qwen_native.config import ModelConfig, YarnScaling
from qwen_native.errors import CheckpointError, located, quoted
from qwen_native.files import MappedFile, parse_json_object
from qwen_native.tensor_names import expected_shapes
from qwen_native.token_table import TokenTable
from qwen_native.tokenizer import AddedToken, Tokenizer

Progress = Callable[[str, int, int], None]
Buffer = npt.NDArray[np.uint8]

VERSION = 1
"""Of the file's structure; tensor layouts have fingerprints of their own."""

_MAGIC = b"QNPACKED"
_PREFIX = struct.Struct("<8sIIQQQ")  # magic, version, 0, header bytes, file bytes, checksum
_PREFIX_BYTES = 64
_MAX_HEADER_BYTES = 1 << 26
_ALIGNMENT = 64
_HUGE_PAGE = 2 << 20
_BLOCK_BYTES = 4 << 20  # written at once, aligned, so that the page cache takes it as huge pages
_CHECK_BYTES = 4 << 20  # summed up at once
_NO_CHECKSUM = "0" * 16
_EMBEDDING = "model.embed_tokens.weight"
_SECTIONS = {"texts": np.uint8, "offsets": np.uint32, "order": np.uint32, "ranks": np.uint32}
_MADV_NOHUGEPAGE = getattr(mmap, "MADV_NOHUGEPAGE", 15)
_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 14)


class UnusablePackedFile(CheckpointError):
    """A packed file is damaged, or was made by another version: it has to be made anew."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor to write.

    Attributes:
        name: canonical name (`tensor_names.expected_shapes`).
        format: a format of `_C.PackedWeight`; "f32" for norms and biases.
        shape: row-major, [out, in] or [size].
        blocks: gives its bytes, in order and in pieces of any size, each time it is called.
        source: type that the tensor had in the checkpoint, such as "Q4_K", or "".
    """

    name: str
    format: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Buffer]]
    source: str = ""

    @classmethod
    def of(cls, name: str, weight: _C.PackedWeight | npt.NDArray[np.float32]) -> PackedTensor:
        """Take a matrix that is already packed, or a vector of float32 values."""
        if isinstance(weight, _C.PackedWeight):
            return cls(name, weight.format, weight.shape, lambda: [weight.data])
        data = np.ascontiguousarray(weight, np.float32)
        return cls(name, "f32", data.shape, lambda: [data.reshape(-1).view(np.uint8)])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return _C.weight_bytes(self.format, *_rows_and_cols(self.shape))


@dataclass(frozen=True)
class _Entry:
    """Where one tensor lies, as the header says and as it has been checked."""

    name: str
    format: str
    shape: tuple[int, ...]
    source: str
    offset: int
    bytes: int
    checksum: str


def _rows_and_cols(shape: Sequence[int]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])


@functools.cache
def layout_fingerprint(format: str) -> str:
    """Checksum of a small fixed matrix in a format: differs when its layout, or how weights are
    rounded to it, has changed."""
    rows, cols = 40, 96
    values = (np.arange(rows * cols, dtype=np.uint32) * np.uint32(2654435761)) >> np.uint32(8)
    matrix = values.astype(np.float32) / np.float32(1 << 23) - np.float32(1)
    matrix[::17] *= 8  # outliers
    data = matrix.view(np.uint8)
    return _hex(_C.checksum(_C.pack_weight(data, "F32", rows, cols, format).data))


def write(
    path: str | Path,
    *,
    config: ModelConfig,
    generation_config: Mapping[str, Any],
    chat_template: str | None,
    tokenizer: Tokenizer | None,
    tensors: Iterable[PackedTensor],
    weights: str,
    source: Mapping[str, Any] | None = None,
    receipt: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a packed file in one step: it appears under its name complete, or not at all.

    Args:
        path: Where; an existing file is replaced, what has mapped it keeps the old one.
        config: The model's shape.
        generation_config: As in `Checkpoint`.
        chat_template: Jinja source, or None.
        tokenizer: None for a model without one.
        tensors: All tensors of the model, each once.
        weights: What the user asked for ("int4", ...), or "mixed".
        source: What the file was made from; JSON object.
        receipt: How good it is, for `qwen-native info`; JSON object.
        progress: Called with (what, bytes done, bytes in total).

    Raises:
        ValueError: The tensors are not those of the config, or one gives too few or many bytes.
        OSError: The file cannot be written; ENOSPC also before any byte has been.
    """
    path = Path(path)
    ordered = _in_file_order(config, tensors)
    sections = {} if tokenizer is None else _tokenizer_sections(tokenizer)
    header: dict[str, Any] = {
        "weights": weights,
        "config": asdict(config),
        "generation_config": dict(generation_config),
        "chat_template": chat_template,
        "source": None if source is None else dict(source),
        "receipt": {} if receipt is None else dict(receipt),
        "formats": {t.format: layout_fingerprint(t.format) for t in ordered},
        "tokenizer": None
        if tokenizer is None
        else {
            "vocab_size": tokenizer.vocab_size,
            "added": [[token.id, token.content, token.special] for token in tokenizer.added],
            "sections": {name: [0, part.nbytes, _NO_CHECKSUM] for name, part in sections.items()},
        },
        "tensors": [
            [t.name, t.format, list(t.shape), t.source, 0, t.nbytes, _NO_CHECKSUM] for t in ordered
        ],
    }
    size = _place(header, config)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, size)  # ENOSPC now rather than half-way
            _write_data(descriptor, header, sections, ordered, size, progress)
            _seal(descriptor, partial, header)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _in_file_order(config: ModelConfig, tensors: Iterable[PackedTensor]) -> list[PackedTensor]:
    """Vectors, then matrices as they are used; an embedding that is only looked up comes last."""
    given = list(tensors)
    by_name = {tensor.name: tensor for tensor in given}
    shapes = expected_shapes(config)
    if len(by_name) != len(given) or by_name.keys() != shapes.keys():
        wrong = sorted(by_name.keys() ^ shapes.keys()) or ["one twice"]
        raise ValueError(f"tensors are not those of the config: {quoted(wrong[0])}")
    for name, shape in shapes.items():
        if by_name[name].shape != shape:
            raise ValueError(f"tensor {name} has shape {by_name[name].shape}, expected {shape}")
    ordered = sorted(shapes, key=lambda name: not _C.is_vector(name))
    if not config.tie_word_embeddings:
        ordered.remove(_EMBEDDING)
        ordered.append(_EMBEDDING)
    return [by_name[name] for name in ordered]


def _tokenizer_sections(tokenizer: Tokenizer) -> dict[str, npt.NDArray[Any]]:
    table = tokenizer.table()
    parts = {name: getattr(table, name) for name in _SECTIONS}
    return {name: part for name, part in parts.items() if part is not None}


def _encode_header(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, allow_nan=False, separators=(",", ":")).encode("ascii")


def _place(header: dict[str, Any], config: ModelConfig) -> int:
    """Fill in the offsets; returns the size of the file."""
    parts = [] if header["tokenizer"] is None else [*header["tokenizer"]["sections"].values()]
    tensors = header["tensors"]
    # The header's length depends on the digits of the offsets, so leave room for the longest.
    longest = len(str(1 << 62))
    position = _PREFIX_BYTES + len(_encode_header(header)) + longest * (len(parts) + len(tensors))
    if position > _MAX_HEADER_BYTES:
        raise ValueError(f"the header takes {position} bytes, expected {_MAX_HEADER_BYTES} or less")
    for part in parts:
        part[0] = position = _rounded(position, _ALIGNMENT)
        position += part[1]
    in_matrices = False
    for tensor in tensors:
        name = tensor[0]
        first_matrix = not in_matrices and not _C.is_vector(name)
        in_matrices = in_matrices or first_matrix
        apart = first_matrix or (name == _EMBEDDING and not config.tie_word_embeddings)
        tensor[4] = position = _rounded(position, _HUGE_PAGE if apart else _ALIGNMENT)
        position += tensor[5]
    return position


def _rounded(position: int, multiple: int) -> int:
    return -(-position // multiple) * multiple


class _BlockWriter:
    """Writes bytes at growing positions in large aligned blocks; gaps become zeros."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._block = np.zeros(_BLOCK_BYTES, np.uint8)
        self._begin = 0  # where the block belongs
        self._used = 0

    def move_to(self, position: int) -> None:
        while self._begin + self._used < position:
            step = min(position - self._begin - self._used, _BLOCK_BYTES - self._used)
            self._block[self._used : self._used + step] = 0
            self._advance(step)

    def write(self, data: Buffer) -> None:
        done = 0
        while done < data.size:
            step = min(data.size - done, _BLOCK_BYTES - self._used)
            self._block[self._used : self._used + step] = data[done : done + step]
            done += step
            self._advance(step)

    def _advance(self, step: int) -> None:
        self._used += step
        if self._used == _BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        _write_at(self._descriptor, self._block[: self._used].data, self._begin)
        self._begin += self._used
        self._used = 0


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data, position = data[count:], position + count


def _write_data(
    descriptor: int,
    header: Mapping[str, Any],
    sections: Mapping[str, npt.NDArray[Any]],
    tensors: Sequence[PackedTensor],
    size: int,
    progress: Progress | None,
) -> None:
    writer = _BlockWriter(descriptor)
    for name, part in sections.items():
        writer.move_to(header["tokenizer"]["sections"][name][0])
        writer.write(part.view(np.uint8))
    for tensor, (*_, offset, expected, _checksum) in zip(tensors, header["tensors"], strict=True):
        writer.move_to(offset)
        written = 0
        for block in tensor.blocks():
            written += block.size
            if written > expected:
                break
            writer.write(block)
            if progress is not None:
                progress("packing weights", offset + written, size)
        if written != expected:
            raise ValueError(
                f"tensor {tensor.name} gave {written} bytes or more, expected {expected}"
            )
    writer.flush()


def _seal(descriptor: int, path: Path, header: dict[str, Any]) -> None:
    """Compute the checksums from what is in the file and write the header."""
    file = MappedFile(path)
    parts = [] if header["tokenizer"] is None else [*header["tokenizer"]["sections"].values()]
    for part in parts:
        part[2] = _data_checksum(file, part[0], part[1])
    for tensor in header["tensors"]:
        tensor[6] = _data_checksum(file, tensor[4], tensor[5])
    text = _encode_header(header)
    prefix = _PREFIX.pack(_MAGIC, VERSION, 0, len(text), file.bytes.nbytes, 0)
    checksum = _C.checksum(np.frombuffer(prefix + text, np.uint8))
    prefix = _PREFIX.pack(_MAGIC, VERSION, 0, len(text), file.bytes.nbytes, checksum)
    _write_at(descriptor, memoryview(prefix.ljust(_PREFIX_BYTES, b"\0") + text), 0)


def _hex(value: int) -> str:
    return f"{value:016x}"


def _data_checksum(file: MappedFile, offset: int, size: int) -> str:
    """Checksum of the checksums of 4 MB pieces, each let go of behind."""
    sums = []
    for begin in range(offset, offset + size, _CHECK_BYTES):
        view = file.bytes[begin : min(begin + _CHECK_BYTES, offset + size)]
        sums.append(_C.checksum(view))
        file.release(view)
    return _hex(_C.checksum(np.array(sums, np.uint64).view(np.uint8)))


class PackedFile:
    """An open packed file.

    Attributes:
        path: the file.
        weights: what the user asked for when it was made.
        config, generation_config, chat_template: as in `Checkpoint`.
        source: what it was made from, or None.
        receipt: how good it is; may be empty.
        header_checksum: hexadecimal; says which file this is.
    """

    def __init__(self, path: str | Path) -> None:
        """Map a file and check its header; `verify` checks the rest.

        Raises:
            CheckpointError: the file cannot be read or is no packed file.
            UnusablePackedFile: it is one, but truncated, altered or of another version.
        """
        self.path = Path(path)
        self._file = MappedFile(self.path)
        with located(self.path):
            header = self._read_header()
            try:
                self._take_header(header)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                if isinstance(error, UnusablePackedFile):
                    raise
                raise UnusablePackedFile(f"the header is damaged: {quoted(str(error))}") from error

    def _read_header(self) -> dict[str, Any]:
        size = self._file.bytes.nbytes
        if self._file.buffer[: len(_MAGIC)] != _MAGIC:
            raise CheckpointError(
                f"begins with {quoted(self._file.buffer[: len(_MAGIC)])}, expected {_MAGIC!r}"
            )
        if size < _PREFIX_BYTES:
            raise UnusablePackedFile(f"has {size} bytes; it is truncated")
        _, version, zero, header_bytes, file_bytes, checksum = _PREFIX.unpack_from(
            self._file.buffer
        )
        if version != VERSION:
            raise UnusablePackedFile(f"is of version {version}, expected {VERSION}")
        if size != file_bytes:
            raise UnusablePackedFile(f"has {size} bytes, expected {file_bytes}; it is damaged")
        if header_bytes > min(_MAX_HEADER_BYTES, size - _PREFIX_BYTES):
            raise UnusablePackedFile(f"the header has {header_bytes} bytes; it is damaged")
        text = self._file.buffer[_PREFIX_BYTES : _PREFIX_BYTES + header_bytes]
        prefix = _PREFIX.pack(_MAGIC, version, zero, header_bytes, file_bytes, 0)
        if _C.checksum(np.frombuffer(prefix + text, np.uint8)) != checksum:
            raise UnusablePackedFile("the header's checksum is wrong; it is damaged")
        self.header_checksum = _hex(checksum)
        self._header_end = _PREFIX_BYTES + header_bytes
        return parse_json_object(text, "header")

    def _take_header(self, header: dict[str, Any]) -> None:
        self.weights = _typed(header["weights"], str, "weights")
        config = dict(_typed(header["config"], dict, "config"))
        if config.get("yarn") is not None:
            config["yarn"] = YarnScaling(**config["yarn"])
        self.config = ModelConfig(**config)
        self.generation_config = _typed(header["generation_config"], dict, "generation_config")
        template = header["chat_template"]
        self.chat_template = None if template is None else _typed(template, str, "chat_template")
        source = header["source"]
        self.source = None if source is None else _typed(source, dict, "source")
        self.receipt = _typed(header["receipt"], dict, "receipt")
        self._tokenizer = header["tokenizer"]
        self._sections = {}
        if self._tokenizer is not None:
            for name, (offset, size, checksum) in self._tokenizer["sections"].items():
                self._sections[name] = _Entry(name, "", (), "", offset, size, checksum)
            missing = {"texts", "offsets", "order"} - self._sections.keys()
            if missing or self._sections.keys() - _SECTIONS.keys():
                raise UnusablePackedFile(f"tokenizer sections are {quoted([*self._sections])}")
        self._tensors = [
            _Entry(name, format, tuple(shape), source, offset, size, checksum)
            for name, format, shape, source, offset, size, checksum in header["tensors"]
        ]
        self._check_places()
        self._check_tensors(_typed(header["formats"], dict, "formats"))

    def _check_places(self) -> None:
        end = self._header_end
        for entry in (*self._sections.values(), *self._tensors):
            if type(entry.offset) is not int or type(entry.bytes) is not int or entry.bytes < 0:
                raise UnusablePackedFile(f"{quoted(entry.name)} has no valid place")
            if entry.offset < end or entry.offset % _ALIGNMENT:
                raise UnusablePackedFile(
                    f"{quoted(entry.name)} is at byte {entry.offset}, expected a multiple of "
                    f"{_ALIGNMENT} from {end} on"
                )
            end = entry.offset + entry.bytes
            if end > self._file.bytes.nbytes:
                raise UnusablePackedFile(f"{quoted(entry.name)} reaches past the end of the file")

    def _check_tensors(self, fingerprints: Mapping[str, Any]) -> None:
        shapes = expected_shapes(self.config)
        names = [entry.name for entry in self._tensors]
        if len(set(names)) != len(names) or set(names) != shapes.keys():
            raise UnusablePackedFile("the tensors are not those of the config")
        for format in {entry.format for entry in self._tensors}:
            # ValueError for a format that this version lacks.
            if fingerprints.get(format) != layout_fingerprint(format):
                raise UnusablePackedFile(f"format {quoted(format)} has another layout today")
        for entry in self._tensors:
            shape = shapes[entry.name]
            if entry.shape != shape:
                raise UnusablePackedFile(
                    f"tensor {entry.name} has shape {quoted(entry.shape)}, expected {shape}"
                )
            expected = _C.weight_bytes(entry.format, *_rows_and_cols(shape))
            if entry.bytes != expected:
                raise UnusablePackedFile(
                    f"tensor {entry.name} has {entry.bytes} bytes, expected {expected}"
                )

    def _view(self, entry: _Entry) -> Buffer:
        return self._file.bytes[entry.offset : entry.offset + entry.bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._file.bytes.nbytes

    @property
    def status(self) -> os.stat_result:
        """Size, times and inode when it was opened."""
        return self._file.status

    def source_types(self) -> Iterator[tuple[str, str]]:
        """Yield the type that each matrix had in the checkpoint, and its format here."""
        for entry in self._tensors:
            if not _C.is_vector(entry.name):
                yield entry.source, entry.format

    def verify(self, threads: int = 1) -> None:
        """Read the whole file and compare its checksums.

        Raises:
            UnusablePackedFile: one differs.
        """
        from concurrent.futures import ThreadPoolExecutor  # most loads do without

        entries = [*self._sections.values(), *self._tensors]

        def is_intact(entry: _Entry) -> bool:
            return _data_checksum(self._file, entry.offset, entry.bytes) == entry.checksum

        with ThreadPoolExecutor(threads) as pool:
            for entry, intact in zip(entries, pool.map(is_intact, entries), strict=True):
                if not intact:
                    raise UnusablePackedFile(
                        f"{self.path}: {quoted(entry.name)} has a wrong checksum; it is damaged"
                    )

    def tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer, which uses the mapped vocabulary.

        Raises:
            UnusablePackedFile: the vocabulary is not usable.
        """
        if self._tokenizer is None:
            return None
        try:
            parts = {
                name: self._view(self._sections[name]).view(kind)
                for name, kind in _SECTIONS.items()
                if name in self._sections
            }
            table = TokenTable(parts["texts"], parts["offsets"], parts["order"], parts.get("ranks"))
            added = [
                AddedToken(
                    _typed(index, int, "id"),
                    _typed(content, str, "content"),
                    _typed(special, bool, "special"),
                )
                for index, content, special in self._tokenizer["added"]
            ]
            size = _typed(self._tokenizer["vocab_size"], int, "vocab_size")
            return Tokenizer.from_table(table, added, size)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UnusablePackedFile(
                f"{self.path}: the vocabulary is damaged: {quoted(str(error))}"
            ) from error

    @property
    def formats(self) -> set[str]:
        """Formats of the matrices."""
        return {entry.format for entry in self._tensors if not _C.is_vector(entry.name)}

    def load(self, invariant: bool, threads: int, gpu: _C.Gpu | None = None) -> _C.Model:
        """Make the model; its weights stay where they are mapped, or are copied to a GPU."""
        self._advise()
        config = asdict(self.config)
        config["max_position_embeddings"] = self.config.context_length
        builder = _C.ModelBuilder(config, "auto", invariant, threads, gpu)
        for entry in self._tensors:
            builder.add_packed(entry.name, entry.format, list(entry.shape), self._view(entry))
        return builder.finish()

    def _advise(self) -> None:
        """Ask for huge pages, but not where single rows are looked up.

        There every touched row would bring in 2 MB.
        """
        matrices = [entry for entry in self._tensors if not _C.is_vector(entry.name)]
        begin, end = matrices[0].offset, self._file.bytes.nbytes
        looked_up = None if self.config.tie_word_embeddings else matrices[-1]
        if looked_up is not None and looked_up.name == _EMBEDDING:
            end = looked_up.offset // _HUGE_PAGE * _HUGE_PAGE
            self._file.advise(end, self._file.bytes.nbytes, _MADV_NOHUGEPAGE)
            self._file.advise(end, self._file.bytes.nbytes, mmap.MADV_RANDOM)
        self._file.advise(begin, end, _MADV_HUGEPAGE)


def _typed(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        raise UnusablePackedFile(f"{name} is {quoted(value)}, expected {kind.__name__}")
    return value
