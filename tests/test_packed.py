"""qwen_native/packed.py: what is written is what is read, and nothing damaged is used."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from demo_model import demo_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from model.tiny import make_checkpoint

from qwen_native import _C, LLM, packed
from qwen_native.checkpoint import Checkpoint, open_checkpoint
from qwen_native.errors import CheckpointError
from qwen_native.packed import PackedFile, PackedTensor, UnusablePackedFile, layout_fingerprint
from qwen_native.packed_cache import write_checkpoint
from qwen_native.tokenizer import AddedToken, Tokenizer

PROMPT = [5, 9, 200, 17, 3, 3, 42]
RECEIPT = {"mean_kl": 0.004, "layers": [1, 2]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own."""
    monkeypatch.setenv("QN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_checkpoint(path, "qwen3")
    return path


@functools.cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(demo_metadata())


def packed_tensors(checkpoint: Checkpoint, format: str) -> list[PackedTensor]:
    """Every tensor packed at once, as a quantiser would hand them over."""
    tensors = []
    for name, source in checkpoint.tensors.items():
        if _C.is_vector(name):
            tensors.append(PackedTensor.of(name, source.data.view(np.float32)))
        else:
            tensors.append(
                PackedTensor.of(name, _C.pack_weight(source.data, "F32", *source.shape, format))
            )
    return tensors


def write_int8(path: Path, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    checkpoint = open_checkpoint(folder)
    packed.write(
        path,
        config=checkpoint.config,
        generation_config={"eos_token_id": [2], "temperature": 0.5},
        chat_template="{{ '<|im_start|>' }}",
        tokenizer=tokenizer,
        tensors=packed_tensors(checkpoint, "int8"),
        weights="int8",
        receipt=RECEIPT,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    path = tmp_path_factory.mktemp("packed") / "small.qn"
    write_int8(path, folder)
    return path


@pytest.mark.parametrize("weights", ["auto", "int4", "int8", "bf16", "f32"])
@pytest.mark.parametrize("tie", [False, True])
def test_logits_are_those_of_the_checkpoint(weights, tie, tmp_path):
    make_checkpoint(tmp_path, "qwen2", tie=tie)
    write_checkpoint(tmp_path / "model.qn", open_checkpoint(tmp_path), weights)
    llm = LLM(tmp_path / "model.qn")
    source = LLM(tmp_path, weights=weights, packed_cache=False)
    assert llm.packed_file == tmp_path / "model.qn"
    assert source.packed_file is None
    assert llm.model.bytes_by_format == source.model.bytes_by_format
    assert llm.model.weight_bytes == source.model.weight_bytes
    assert llm.kv_dtype == source.kv_dtype
    np.testing.assert_array_equal(llm.logits(PROMPT), source.logits(PROMPT))


def test_everything_comes_back(small, folder):
    file = PackedFile(small)
    file.verify(2)
    assert file.config == open_checkpoint(folder).config
    assert file.generation_config == {"eos_token_id": [2], "temperature": 0.5}
    assert file.chat_template == "{{ '<|im_start|>' }}"
    assert file.receipt == RECEIPT
    assert file.weights == "int8"
    assert file.source is None
    assert file.tokenizer() is None
    llm = LLM(small)
    assert llm.receipt == RECEIPT
    assert llm.eos_ids == (2,)
    assert llm.defaults.temperature == 0.5


def test_yarn_survives(tmp_path):
    make_checkpoint(tmp_path, "qwen3", yarn=True)
    checkpoint = open_checkpoint(tmp_path)
    write_checkpoint(tmp_path / "yarn.qn", checkpoint, "int4")
    assert PackedFile(tmp_path / "yarn.qn").config == checkpoint.config


def test_the_tokenizer_is_mapped(tmp_path, folder):
    write_int8(tmp_path / "a.qn", folder, demo_tokenizer())
    file = PackedFile(tmp_path / "a.qn")
    file.verify()
    tokenizer = file.tokenizer()
    text = "Überall <|im_end|> 你好\n\n  x"
    assert tokenizer.encode(text) == demo_tokenizer().encode(text)
    assert tokenizer.special_tokens == demo_tokenizer().special_tokens
    ids = list(range(0, tokenizer.vocab_size, 97))
    assert tokenizer.decode(ids) == demo_tokenizer().decode(ids)


def test_tensors_lie_where_kernels_and_huge_pages_want_them(small):
    file = PackedFile(small)
    matrices = [entry for entry in file._tensors if not _C.is_vector(entry.name)]
    assert all(entry.offset % 64 == 0 for entry in file._tensors)
    assert matrices[0].offset % (2 << 20) == 0
    assert matrices[-1].name == "model.embed_tokens.weight"
    assert matrices[-1].offset % (2 << 20) == 0


def test_formats_may_be_mixed(tmp_path, folder):
    checkpoint = open_checkpoint(folder)
    int4, int8 = packed_tensors(checkpoint, "int4"), packed_tensors(checkpoint, "int8")
    tensors = [a if "mlp" in a.name else b for a, b in zip(int4, int8, strict=True)]
    packed.write(
        tmp_path / "mixed.qn",
        config=checkpoint.config,
        generation_config={},
        chat_template=None,
        tokenizer=None,
        tensors=tensors,
        weights="mixed",
    )
    llm = LLM(tmp_path / "mixed.qn")
    assert set(llm.model.bytes_by_format) == {"int4", "int8"}
    assert np.isfinite(llm.logits(PROMPT)).all()


def test_other_weights_than_the_file_holds_are_refused(small):
    assert LLM(small, weights="int8").packed_file == small
    with pytest.raises(ValueError, match="holds int8; expected auto"):
        LLM(small, weights="int4")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[:-1], "not those of the config"),
        (lambda t: [*t, t[0]], "not those of the config"),
        (lambda t: [PackedTensor("x.weight", "f32", (3,), list), *t[1:]], "not those"),
        (lambda t: [PackedTensor(t[0].name, "f32", (2, 2), list), *t[1:]], "has shape"),
        (lambda t: [PackedTensor(t[0].name, t[0].format, t[0].shape, list), *t[1:]], "gave 0"),
        (
            lambda t: [
                PackedTensor(
                    t[0].name, t[0].format, t[0].shape, lambda: [*t[0].blocks(), *t[0].blocks()]
                ),
                *t[1:],
            ],
            "expected",
        ),
    ],
)
def test_wrong_tensors_are_not_written(change, problem, tmp_path, folder):
    checkpoint = open_checkpoint(folder)
    with pytest.raises(ValueError, match=problem):
        packed.write(
            tmp_path / "a.qn",
            config=checkpoint.config,
            generation_config={},
            chat_template=None,
            tokenizer=None,
            tensors=change(packed_tensors(checkpoint, "int8")),
            weights="int8",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, folder, monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        write_int8(tmp_path / "a.qn", folder)
    assert list(tmp_path.iterdir()) == []


def altered(source: Path, target: Path, begin: int, data: bytes) -> Path:
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        file.seek(begin)
        file.write(data)
    return target


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(data):
    small, scratch = files()
    size = small.stat().st_size
    ends = sorted({entry.offset + entry.bytes for entry in entries(PackedFile(small))})
    where = data.draw(
        st.one_of(
            st.integers(0, 63),
            st.integers(0, 4000),
            st.integers(0, size - 1),
            st.sampled_from(ends).map(lambda end: end - 1),
        )
    )
    bit = data.draw(st.integers(0, 7))
    before = small.read_bytes()[where]
    path = altered(small, scratch, where, bytes([before ^ 1 << bit]))
    if not is_used(small, where):
        return  # padding between parts
    with pytest.raises(CheckpointError):
        PackedFile(path).verify()


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.integers(1, 70000))
def test_truncated_and_longer_files_are_found(share, more):
    small, scratch = files()
    shutil.copyfile(small, scratch)
    size = int(share * (scratch.stat().st_size - 1))
    os.truncate(scratch, size)
    with pytest.raises(CheckpointError):
        PackedFile(scratch)
    os.truncate(scratch, small.stat().st_size + more)
    with pytest.raises(CheckpointError):
        PackedFile(scratch)


@functools.cache
def files() -> tuple[Path, Path]:
    """A file and a place for its damaged copy, for tests that hypothesis repeats."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    make_checkpoint(folder, "qwen3", num_heads=2, num_kv_heads=1, num_hidden_layers=1)
    tokens = [*(bytes([i]) for i in range(256)), b"ab"]
    tokenizer = Tokenizer(
        tokens, range(257), [AddedToken(257, "<|x|>", True)], {t: i for i, t in enumerate(tokens)}
    )
    write_int8(folder / "small.qn", folder, tokenizer)
    return folder / "small.qn", folder / "damaged.qn"


def is_used(path: Path, where: int) -> bool:
    file = PackedFile(path)
    if where < file._header_end:
        return where < 40 or where >= 64
    return any(entry.offset <= where < entry.offset + entry.bytes for entry in entries(file))


def entries(file: PackedFile) -> list:
    return [*file._sections.values(), *file._tensors]


def with_header(path: Path, change) -> Path:
    """Write a copy whose header has been changed and whose checksum is right: a lying file."""
    small, scratch = files()
    data = bytearray(small.read_bytes())
    magic, version, zero, length, size, _ = struct.unpack_from("<8sIIQQQ", data)
    header = json.loads(data[64 : 64 + length])
    header = change(header) or header
    text = json.dumps(header, separators=(",", ":")).encode()
    room = min(entry.offset for entry in entries(PackedFile(small))) - 64
    if len(text) > room:
        pytest.skip("the changed header does not fit before the tensors")
    prefix = struct.pack("<8sIIQQQ", magic, version, zero, len(text), size, 0)
    checksum = _C.checksum(np.frombuffer(prefix + text, np.uint8))
    prefix = struct.pack("<8sIIQQQ", magic, version, zero, len(text), size, checksum)
    data[: 64 + len(text)] = prefix.ljust(64, b"\0") + text
    scratch.write_bytes(data)
    return scratch


def set_in(header: dict, *steps_and_value) -> None:
    *steps, last, value = steps_and_value
    for step in steps:
        header = header[step]
    header[last] = value


@pytest.mark.parametrize(
    "steps",
    [
        ("tensors", 0, 4, 0),  # offset inside the header
        ("tensors", 0, 4, 1 << 62),
        ("tensors", 0, 4, -64),
        ("tensors", 0, 4, "x"),
        ("tensors", 0, 4, 1.5),
        ("tensors", 3, 5, 1),  # bytes
        ("tensors", -1, 5, 1 << 63),
        ("tensors", 1, 0, "x"),  # name
        ("tensors", 1, 0, 7),
        ("tensors", -1, 1, "int4"),  # format
        ("tensors", -1, 1, "int3"),
        ("tensors", -1, 2, [1 << 40, 1 << 40]),  # shape
        ("tensors", -1, 2, []),
        ("tensors", [[]]),
        ("tensors", None),
        ("tokenizer", {}),
        ("tokenizer", []),
        ("tokenizer", "sections", []),
        ("tokenizer", "sections", "texts", None),
        ("tokenizer", "sections", "offsets", [64, 4, "0"]),
        ("tokenizer", {"sections": {"texts": [64, 1, "0"]}}),
        ("formats", {}),
        ("formats", "int8", "0" * 16),  # another layout
        ("config", {}),
        ("config", "hidden_size", 1 << 60),
        ("config", "num_layers", 2),
        ("config", "yarn", {"factor": 1}),
        ("config", "extra", 1),
        ("weights", 1),
        ("receipt", []),
        ("source", []),
        ("chat_template", 1),
        ("generation_config", None),
    ],
)  # fmt: skip
def test_lying_headers_are_refused(steps, tmp_path):
    path = with_header(tmp_path, lambda header: set_in(header, *steps))
    with pytest.raises(UnusablePackedFile):
        PackedFile(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 64), 1 << 64)
    | st.sampled_from([0.0, 1e300, -1, 64, 1 << 31, 1 << 63, "", "int4", "f32", "texts"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=3,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_a_header_says_nothing_crashes(data):
    def change(header: dict) -> None:
        node = header
        while True:
            key = data.draw(
                st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))
            )
            child = node[key]
            if (
                not isinstance(child, (dict, list))
                or not child
                or data.draw(st.integers(0, 3)) == 0
            ):
                node[key] = data.draw(JSON)
                return
            node = child

    path = with_header(None, change)
    try:
        file = PackedFile(path)
        tokenizer = file.tokenizer()
        file.load(False, 1)
    except CheckpointError:
        return
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("a<|x|> ab"))


@pytest.mark.parametrize(
    ("name", "format", "shape", "size", "shift", "problem"),
    [
        ("model.norm.weight", "f32", [96], 384, 4, "not aligned to 64"),
        ("model.norm.weight", "f32", [96], 380, 0, "has 380 bytes, expected 384"),
        ("model.norm.weight", "bf16", [96], 192, 0, "expected an f32 vector"),
        ("model.norm.weight", "f32", [2, 48], 384, 0, "expected an f32 vector"),
        ("lm_head.weight", "int3", [32, 32], 384, 0, "format is 'int3'"),
        ("lm_head.weight", "f32", [2, 3, 4], 96, 0, "has 3 dimensions"),
    ],
)
def test_the_builder_checks_what_it_is_given(name, format, shape, size, shift, problem, folder):
    config = asdict(open_checkpoint(folder).config)
    builder = _C.ModelBuilder(config, "auto", False, 1)
    memory = np.zeros(1024, np.uint8)
    begin = -memory.ctypes.data % 64 + shift
    with pytest.raises(ValueError, match=problem):
        builder.add_packed(name, format, shape, memory[begin : begin + size])


def test_the_builder_takes_each_tensor_once(folder):
    builder = _C.ModelBuilder(asdict(open_checkpoint(folder).config), "auto", False, 1)
    data = _C.pack_weight(np.zeros(4096, np.uint8), "F32", 32, 32, "int8").data
    builder.add_packed("lm_head.weight", "int8", [32, 32], data)
    with pytest.raises(ValueError, match="given twice"):
        builder.add_packed("lm_head.weight", "int8", [32, 32], data)
    with pytest.raises(ValueError, match="is missing"):
        builder.finish()


def test_a_header_must_have_every_key(tmp_path):
    for key in ("tensors", "config", "weights", "formats", "receipt", "tokenizer", "source"):
        with pytest.raises(UnusablePackedFile):
            PackedFile(with_header(tmp_path, lambda header, key=key: header.pop(key) and None))


def test_another_version_is_refused(tmp_path):
    small, scratch = files()
    path = altered(small, scratch, 8, struct.pack("<I", packed.VERSION + 1))
    with pytest.raises(UnusablePackedFile, match=f"version {packed.VERSION + 1}, expected"):
        LLM(path)


def test_something_else_is_no_packed_file(tmp_path):
    (tmp_path / "a.qn").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="begins with"):
        LLM(tmp_path / "a.qn")
    (tmp_path / "a.qn").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        LLM(tmp_path / "a.qn")


def test_damage_in_a_file_that_was_fine_before_is_found(tmp_path, folder):
    path = tmp_path / "a.qn"
    write_int8(path, folder)
    LLM(path)
    status = path.stat()
    entry = PackedFile(path)._tensors[5]
    with path.open("r+b") as file:
        file.seek(entry.offset + 1)
        file.write(b"\x55")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UnusablePackedFile, match=f"{entry.name}.*wrong checksum"):
        LLM(path)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 299), st.integers(0, 255))
def test_the_checksum_finds_changes(data, where, value):
    array = np.frombuffer(data, np.uint8)
    changed = array.copy()
    if where < len(data) and changed[where] != value:
        changed[where] = value
        assert _C.checksum(changed) != _C.checksum(array)
    assert _C.checksum(np.append(array, np.uint8(0))) != _C.checksum(array)


def reference_checksum(data: bytes) -> int:
    """csrc/core/checksum.h in Python's own arithmetic."""
    mask = (1 << 64) - 1

    def mix(state: int, word: int) -> int:
        state = (state ^ word) * 0x9E3779B97F4A7C15 & mask
        return state ^ state >> 32

    lanes = list(range(8))
    for begin in range(0, len(data), 64):
        words = struct.unpack("<8Q", data[begin : begin + 64].ljust(64, b"\0"))
        lanes = [mix(lane, word) for lane, word in zip(lanes, words, strict=True)]
    result = mix(0x9E3779B97F4A7C15, len(data))
    for word in (*lanes, 0):
        result = mix(result, word)
    return result


@given(st.binary(max_size=400))
def test_the_checksum_is_the_documented_one(data):
    assert _C.checksum(np.frombuffer(data, np.uint8)) == reference_checksum(data)


def test_fingerprints_differ_by_format_and_not_by_level(isa):
    layout_fingerprint.cache_clear()
    formats = ("int4", "int4_symmetric", "int8", "int8_grouped")
    seen = {format: layout_fingerprint(format) for format in formats}
    assert len(set(seen.values())) == len(formats)
    first = FINGERPRINTS.setdefault("all", seen)
    assert seen == first


FINGERPRINTS: dict[str, dict[str, str]] = {}
