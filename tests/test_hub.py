"""Where models come from; the demo's parts are small fakes except in one test."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_native import hub
from qwen_native.errors import CheckpointError
from qwen_native.hub import DEMO, DemoModel, cache_folder, demo_model, resolve_model

CONTENT = bytes(range(256)) * 41


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    """A demo of three parts whose modules lie on the import path and must not be run."""
    site = tmp_path / "site"
    cuts = [0, 4096, 8000, len(CONTENT)]
    parts = []
    for i in range(3):
        folder = site / f"qn_fake_part{i}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise RuntimeError('was imported')")
        (folder / "slice.bin").write_bytes(CONTENT[cuts[i] : cuts[i + 1]])
        parts.append((f"qn_fake_part{i}", "data/slice.bin"))
    monkeypatch.syspath_prepend(str(site))
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    return DemoModel("demo.gguf", tuple(parts), len(CONTENT), sha256)


def part(tmp_path: Path, i: int) -> Path:
    return tmp_path / "site" / f"qn_fake_part{i}" / "data" / "slice.bin"


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix not in (".lock", ".json"))


def test_joins_once(demo: DemoModel, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    folder = tmp_path / "deep" / "cache"
    path = demo_model(demo, folder, lambda *call: calls.append(call))
    assert path == folder / "demo.gguf" and path.read_bytes() == CONTENT
    assert leftovers(folder) == ["demo.gguf"]
    assert calls[-1] == ("Joining the demo model", demo.size, demo.size)
    assert [done for _, done, _ in calls] == [4096, 8000, demo.size]

    calls.clear()
    inode = path.stat().st_ino
    assert demo_model(demo, folder, lambda *call: calls.append(call)) == path
    assert not calls and path.stat().st_ino == inode


def test_a_stamped_file_needs_no_parts(demo: DemoModel, tmp_path: Path) -> None:
    path = demo_model(demo, tmp_path / "cache")
    part(tmp_path, 0).unlink()
    assert demo_model(demo, tmp_path / "cache") == path


def test_a_damaged_file_is_joined_anew(demo: DemoModel, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    path = demo_model(demo, folder)
    wrong = bytearray(CONTENT)
    wrong[7000] ^= 1
    for damaged in (CONTENT[:-1], b"", bytes(wrong), CONTENT + b"x"):
        path.write_bytes(damaged)
        demo_model(demo, folder)
        assert path.read_bytes() == CONTENT
        replacement = folder / "other"
        replacement.write_bytes(damaged)
        os.replace(replacement, path)
        demo_model(demo, folder)
        assert path.read_bytes() == CONTENT


def test_an_edit_that_keeps_size_and_mtime_is_noticed(demo: DemoModel, tmp_path: Path) -> None:
    path = demo_model(demo, tmp_path / "cache")
    status = path.stat()
    time.sleep(0.02)
    with path.open("r+b") as file:
        file.write(b"\xff")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert demo_model(demo, tmp_path / "cache").read_bytes() == CONTENT


def test_a_good_copy_without_a_stamp_is_accepted(demo: DemoModel, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "demo.gguf").write_bytes(CONTENT)
    for i in range(3):
        part(tmp_path, i).unlink()
    calls: list[str] = []
    demo_model(demo, folder, lambda what, done, total: calls.append(what))
    assert calls == ["Checking the demo model"]
    calls.clear()
    demo_model(demo, folder, lambda what, done, total: calls.append(what))
    assert not calls


@pytest.mark.parametrize("stamp", ["", "[]", "{}", '{"size": 1}', "\xff", "x" * 10_000])
def test_a_bad_stamp_means_hashing(stamp: str, demo: DemoModel, tmp_path: Path) -> None:
    path = demo_model(demo, tmp_path / "cache")
    stamp_path = path.with_name("demo.gguf.stamp.json")
    good = json.loads(stamp_path.read_text())
    stamp_path.write_text(stamp, encoding="latin-1")
    assert demo_model(demo, tmp_path / "cache") == path
    assert json.loads(stamp_path.read_text()) == good


def test_refuses_wrong_parts(demo: DemoModel, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    good = part(tmp_path, 1).read_bytes()
    for wrong, message in [
        (good[:-1], f"hold {demo.size - 1} bytes, expected {demo.size}"),
        (good + b"x", f"hold {demo.size + 1} bytes, expected {demo.size}"),
        (good[::-1], f"with SHA-256 [0-9a-f]{{64}}, expected {demo.sha256}"),
    ]:
        part(tmp_path, 1).write_bytes(wrong)
        with pytest.raises(CheckpointError, match=message):
            demo_model(demo, folder)
        assert leftovers(folder) == []


def test_a_missing_package_names_the_command(demo: DemoModel, tmp_path: Path) -> None:
    missing = replace(demo, parts=(*demo.parts, ("qn_no_such_module", "data/x.bin")))
    for wrong in (missing, replace(demo, parts=(("qn_fake_part0", "data/none.bin"),))):
        with pytest.raises(CheckpointError, match=r"pip install 'qwen_native\[demo\]'"):
            demo_model(wrong, tmp_path / "cache")


def test_a_failure_leaves_nothing(
    demo: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"

    def interrupt(what: str, done: int, total: int) -> None:
        assert leftovers(folder) == ["demo.gguf.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_model(demo, folder, interrupt)
    assert leftovers(folder) == []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*bytes are needed.*QN_CACHE"):
        demo_model(demo, folder)
    assert leftovers(folder) == []
    monkeypatch.undo()


def test_a_disk_that_is_too_small_is_refused_before_writing(
    tmp_path: Path, demo: DemoModel
) -> None:
    huge = 1 << 62
    with pytest.raises(CheckpointError, match="hold"):
        demo_model(replace(demo, size=huge), tmp_path / "cache")
    with part(tmp_path, 0).open("r+b") as file:
        file.truncate(1 << 43)  # sparse
    size = (1 << 43) + len(CONTENT) - 4096
    with pytest.raises(CheckpointError, match=r"bytes are free.*bytes are needed"):
        demo_model(replace(demo, size=size), tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(demo: DemoModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be stored.*QN_CACHE"):
        demo_model(demo, tmp_path / "file" / "cache")
    with pytest.raises(CheckpointError, match=r"cannot be stored"):
        demo_model(demo, Path("/proc/qn"))


def test_a_read_only_cache_with_a_good_file_works(
    demo: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "demo.gguf").write_bytes(CONTENT)
    real_open = os.open

    def read_only(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, mode)

    # The tests may run as root, whom file permissions do not stop.
    monkeypatch.setattr(os, "open", read_only)
    assert demo_model(demo, folder) == folder / "demo.gguf"


JOIN_SCRIPT = """
import sys, time
from pathlib import Path
from qwen_native.hub import DemoModel, demo_model
parts = tuple((f"qn_fake_part{i}", "data/slice.bin") for i in range(3))
demo = DemoModel("demo.gguf", parts, int(sys.argv[2]), sys.argv[3])
def progress(what, done, total):
    print(what, flush=True)
    time.sleep(float(sys.argv[4]))
demo_model(demo, Path(sys.argv[1]), progress)
"""


def start(demo: DemoModel, tmp_path: Path, pause: float) -> subprocess.Popen[str]:
    arguments = [str(tmp_path / "cache"), str(demo.size), demo.sha256, str(pause)]
    return subprocess.Popen(
        [sys.executable, "-c", JOIN_SCRIPT, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path])},
        cwd=tmp_path,  # not the checkout, whose package may lack the extension
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_join_only_once(demo: DemoModel, tmp_path: Path) -> None:
    processes = [start(demo, tmp_path, 0.3) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(output.count("Joining") for output in outputs) == [0, 3]
    assert (tmp_path / "cache" / "demo.gguf").read_bytes() == CONTENT


def test_a_killed_process_leaves_nothing_that_looks_complete(
    demo: DemoModel, tmp_path: Path
) -> None:
    process = start(demo, tmp_path, 60.0)
    assert process.stdout is not None and process.stdout.readline() == "Joining the demo model\n"
    process.kill()
    process.wait(timeout=60)
    process.stdout.close()
    assert not (tmp_path / "cache" / "demo.gguf").exists()
    path = demo_model(demo, tmp_path / "cache")
    assert path.read_bytes() == CONTENT and leftovers(path.parent) == ["demo.gguf"]


def test_the_real_demo() -> None:
    """Uses the real cache folder, so that the other tests of the demo find the file there."""
    try:
        hub._find_parts(DEMO)
    except CheckpointError as error:
        pytest.skip(str(error))
    path = resolve_model(None)
    assert path == cache_folder() / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    assert path.stat().st_size == 491_400_064
    assert digest.hexdigest() == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    begin = time.process_time()
    assert resolve_model(None) == path
    assert time.process_time() - begin < 0.05


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("QN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/somebody/.cache/qwen_native")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path("/home/somebody/.cache/qwen_native")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/qwen_native")
    monkeypatch.setenv("QN_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_local_paths_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "a.gguf").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("owner/name") == Path("owner/name")
    assert resolve_model(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert resolve_model("~/a.gguf") == tmp_path / "a.gguf"


@pytest.mark.parametrize(
    "model",
    ["", "nothing", "./no/folder", "/no/folder", "a/b/c", "owner/b.gguf", "a\0b", "x" * 5000, "a/"],
)
def test_refuses_names(model: str) -> None:
    with pytest.raises(CheckpointError) as error:
        resolve_model(model)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_refuses_a_path_object_that_does_not_exist() -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(Path("owner/name"))


def test_a_repository_needs_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'qwen_native\[hub\]'"):
        resolve_model("owner/name")


def test_downloads_only_the_needed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []

    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        calls.append((repository, allow_patterns))
        return str(tmp_path)

    client = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    with pytest.raises(CheckpointError, match=r"no config.json.*GGUF"):
        resolve_model("Qwen/Qwen2.5-0.5B-Instruct-GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    repository, patterns = calls[-1]
    assert repository == "Qwen/Qwen3-0.6B"
    assert "config.json" in patterns and not any("*.bin" in p or "gguf" in p for p in patterns)


def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        raise RuntimeError("404 Client Error.\nRepository Not Found\n")

    client = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    with pytest.raises(CheckpointError, match=r"^model 'a/b': download failed: 404 Client Error.$"):
        resolve_model("a/b")
