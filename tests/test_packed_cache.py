"""qwen_native/packed_cache.py: made once, used while it fits, never when it does not."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants
from model.tiny import make_checkpoint
from tiny_models import GGUF_HEADS, GGUF_HIDDEN, GGUF_INTER, GGUF_KV_HEADS, gguf_shapes

from qwen_native import _C, LLM, packed, packed_cache
from qwen_native.packed import PackedFile
from qwen_native.packed_cache import packed_path
from qwen_native.tokenizer import gpt2_alphabet

PROMPT = [5, 9, 77, 17, 3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QN_PACKED_CACHE", "1")
    return tmp_path / "cache" / "packed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model", "qwen2")
    return tmp_path / "model"


def files(cache: Path, suffix: str = ".qn") -> list[Path]:
    return sorted(cache.glob("*" + suffix)) if cache.exists() else []


def logits(path: Path, **options) -> np.ndarray:
    return LLM(path, **options).logits(PROMPT)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_the_second_load_uses_what_the_first_made(weights, folder, cache):
    expected = logits(folder, weights=weights, packed_cache=False)
    assert files(cache) == []
    first = LLM(folder, weights=weights)
    assert files(cache) == [first.packed_file] == [packed_path(folder, weights)]
    made = first.packed_file.stat()
    second = LLM(folder, weights=weights)
    assert second.packed_file.stat() == made
    for llm in (first, second):
        np.testing.assert_array_equal(llm.logits(PROMPT), expected)
        assert llm.notices == []
        assert llm.model.bytes_by_format.keys() == {weights}


@pytest.mark.parametrize("weights", ["auto", "f32", "bf16"])
def test_float_weights_need_no_packed_file(weights, folder, cache):
    assert LLM(folder, weights=weights).packed_file is None
    assert files(cache) == []


def save_finite_gguf(path: Path) -> None:
    """A random model in the block types that the gguf package can write, with a vocabulary."""
    rng = np.random.default_rng(3)
    writer = GGUFWriter(path, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(GGUF_HIDDEN)
    writer.add_feed_forward_length(GGUF_INTER)
    writer.add_head_count(GGUF_HEADS)
    writer.add_head_count_kv(GGUF_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(sorted(gpt2_alphabet()))
    writer.add_token_types([1] * 256)
    writer.add_token_merges([])
    kinds = [GGMLQuantizationType[name] for name in ("Q4_0", "Q8_0", "Q5_0", "BF16", "F16", "Q4_1")]
    shapes = gguf_shapes("qwen2", 2, False)
    shapes["token_embd.weight"] = shapes["output.weight"] = (256, GGUF_HIDDEN)
    for i, (name, shape) in enumerate(shapes.items()):
        values = rng.normal(size=shape).astype(np.float32) * 0.05
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else kinds[i % len(kinds)]
        writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_gguf_is_packed_too(weights, tmp_path, cache):
    path = tmp_path / "tiny.gguf"
    save_finite_gguf(path)
    expected = LLM(path, weights=weights, packed_cache=False)
    for _ in range(2):
        llm = LLM(path, weights=weights)
        assert llm.packed_file is not None
        assert llm.model.bytes_by_format == expected.model.bytes_by_format
        np.testing.assert_array_equal(llm.logits([1, 2, 3]), expected.logits([1, 2, 3]))
        assert llm.tokenizer.encode("abc") == expected.tokenizer.encode("abc")
        assert llm.eos_ids == expected.eos_ids


def test_it_can_be_switched_off(folder, cache, monkeypatch):
    assert LLM(folder, weights="int8", packed_cache=False).packed_file is None
    monkeypatch.setenv("QN_PACKED_CACHE", "0")
    assert LLM(folder, weights="int8").packed_file is None
    assert files(cache) == []
    assert LLM(folder, weights="int8", packed_cache=True).packed_file is not None


def test_each_choice_of_weights_and_each_path_has_its_own(folder, cache, tmp_path):
    shutil.copytree(folder, tmp_path / "copy" / "model")
    used = {
        LLM(path, weights=weights).packed_file
        for path in (folder, tmp_path / "copy" / "model")
        for weights in ("int4", "int8")
    }
    assert len(used) == 4


def test_another_source_under_the_same_path_replaces_it(folder, cache, tmp_path):
    before = logits(folder, weights="int8")
    other = tmp_path / "other"
    make_checkpoint(other, "qwen2", initializer_range=0.3)
    for name in ("config.json", "model.safetensors"):
        status = (folder / name).stat()
        shutil.copyfile(other / name, folder / name)  # the same size, and the same time:
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = logits(folder, weights="int8")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, logits(folder, weights="int8", packed_cache=False))
    assert len(files(cache)) == 1


def test_damage_version_and_layout_lead_to_a_new_file(folder, cache, monkeypatch):
    expected = logits(folder, weights="int4")
    (path,) = files(cache)
    entry = PackedFile(path)._tensors[-1]

    def flip(where: int) -> None:
        data = bytearray(path.read_bytes())
        data[where] ^= 1
        path.write_bytes(data)

    for damage in (
        lambda: flip(9),  # version
        lambda: flip(300),  # header
        lambda: flip(entry.offset),
        lambda: flip(entry.offset + entry.bytes - 1),
        lambda: os.truncate(path, entry.offset + 5),
        lambda: os.truncate(path, 0),
        lambda: path.unlink(),
        lambda: path.write_bytes(b"something else"),
    ):
        damage()
        llm = LLM(folder, weights="int4")
        np.testing.assert_array_equal(llm.logits(PROMPT), expected)
        PackedFile(path).verify()
        assert llm.notices == []

    made = path.stat().st_ino
    monkeypatch.setattr(packed, "VERSION", packed.VERSION + 1)
    assert LLM(folder, weights="int4").packed_file.stat().st_ino != made
    made = path.stat().st_ino
    monkeypatch.setattr(packed, "layout_fingerprint", lambda format: "another layout")
    assert LLM(folder, weights="int4").packed_file.stat().st_ino != made


def test_another_choice_of_formats_leads_to_a_new_file(folder, cache, monkeypatch):
    LLM(folder, weights="int4")
    monkeypatch.setattr(_C, "chosen_format", lambda weights, source: "int8")
    assert LLM(folder, weights="int4").model.bytes_by_format.keys() == {"int8"}


def test_a_cache_that_cannot_be_written_costs_a_notice_only(folder, tmp_path, monkeypatch):
    expected = logits(folder, weights="int8", packed_cache=False)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("QN_CACHE", str(tmp_path / "file"))
    llm = LLM(folder, weights="int8")
    assert llm.packed_file is None
    assert len(llm.notices) == 1 and "cannot be kept" in llm.notices[0]
    np.testing.assert_array_equal(llm.logits(PROMPT), expected)


def test_a_disk_that_is_too_full_costs_a_notice_only(folder, cache, monkeypatch):
    full = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    llm = LLM(folder, weights="int8")
    assert llm.packed_file is None
    assert "1000 are free" in llm.notices[0]
    assert files(cache) == []


def test_without_stamps_every_load_checks(folder, cache, monkeypatch):
    checked = []
    verify = PackedFile.verify
    monkeypatch.setattr(
        PackedFile, "verify", lambda file, *a: (checked.append(file), verify(file, *a))
    )
    LLM(folder, weights="int8")
    LLM(folder, weights="int8")
    assert checked == []
    for stamp in files(cache, ".verified.json"):
        stamp.write_text("{}")
    LLM(folder, weights="int8")
    assert len(checked) == 1
    LLM(folder, weights="int8")
    assert len(checked) == 1


def test_progress_runs_to_the_end(folder):
    seen = []
    LLM(folder, weights="int8", progress=lambda *step: seen.append(step))
    done = [step[1] for step in seen if step[0] == "packing weights"]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2]


LOAD = """
import sys
from qwen_native import LLM
llm = LLM(sys.argv[1], weights="int4")
print(llm.packed_file, llm.logits([5, 9, 77])[-1].sum(), flush=True)
sys.stdin.read()
"""


def start(folder: Path, tmp_path: Path, code: str = LOAD) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(packed.__file__).parent.parent)},
    )


def test_processes_that_load_at_once_make_one_file_and_share_it(folder, cache, tmp_path):
    processes = [start(folder, tmp_path) for _ in range(3)]
    try:
        lines = {process.stdout.readline() for process in processes}
        (path,) = files(cache)
        assert len(lines) == 1 and str(path) in lines.pop()
        for process in processes:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert f" {path.stat().st_ino} " in maps and str(path) in maps
            assert "deleted" not in "".join(line for line in maps.splitlines() if ".qn" in line)
    finally:
        for process in processes:
            process.communicate("")
    assert list(cache.glob("*.partial")) == []


KILLED = """
import os, signal, sys
from qwen_native import LLM
def die(what, done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
LLM(sys.argv[1], weights="int4", progress=die)
"""


def test_a_crash_half_way_leaves_nothing_that_looks_complete(folder, cache, tmp_path):
    assert start(folder, tmp_path, KILLED).wait() == -signal.SIGKILL
    assert files(cache) == []
    assert len(list(cache.glob("*.partial"))) == 1
    llm = LLM(folder, weights="int4")
    assert llm.packed_file is not None
    assert list(cache.glob("*.partial")) == []


def test_an_open_model_outlives_its_replacement(folder, cache):
    llm = LLM(folder, weights="int8")
    expected = llm.logits(PROMPT)
    os.utime(folder / "config.json", ns=(time.time_ns(), time.time_ns()))
    again = LLM(folder, weights="int8")
    np.testing.assert_array_equal(llm.logits(PROMPT), expected)
    np.testing.assert_array_equal(again.logits(PROMPT), expected)


def test_source_identity_sees_every_file(folder):
    before = packed_cache.source_identity(folder)
    assert packed_cache.source_identity(folder) == before
    (folder / "tokenizer_config.json").write_text("{}")
    assert packed_cache.source_identity(folder) != before
