"""A real GPU in the place of the simulator: the kernels' tests on libqn_cuda.so.

`QN_CUDA_LIBRARY=.../libqn_cuda.so pytest tests/cuda` runs them (tools/gpu_check.sh does). What only
the executor can say, such as traffic, is skipped.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
from cuda_simulator import Counters, Launch, LineTraffic, Report, Simulator


def library_of_environment() -> Path | None:
    """The library that QN_CUDA_LIBRARY names."""
    name = os.environ.get("QN_CUDA_LIBRARY")
    return Path(name) if name else None


class _Memory:
    """The library with the simulator's functions for memory, made of the GPU runtime's."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)
        self._library.qn_gpu_error.restype = ctypes.c_char_p
        self.stream = self._created("stream_create")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def check(self, error: int) -> None:
        assert error == 0, self._library.qn_gpu_error(error).decode()

    def _created(self, name: str, *arguments: object) -> int:
        pointer = ctypes.c_void_p()
        self.check(getattr(self._library, f"qn_gpu_{name}")(ctypes.byref(pointer), *arguments))
        return pointer.value or 0

    def sync(self) -> None:
        self.check(self._library.qn_gpu_stream_sync(ctypes.c_void_p(self.stream)))

    def _copy(self, to: int, source: int, size: int) -> None:
        self.check(
            self._library.qn_gpu_copy(
                ctypes.c_void_p(to),
                ctypes.c_void_p(source),
                ctypes.c_size_t(size),
                ctypes.c_void_p(self.stream),
            )
        )
        self.sync()

    def _free_host(self, pointer: int) -> None:
        self.check(self._library.qn_gpu_free_host(ctypes.c_void_p(pointer)))

    def qn_simt_alloc(self, size: int) -> int:
        """Memory full of NaN, as the simulator's is."""
        size = max(size, 1)
        pointer = self._created("alloc", ctypes.c_size_t(size), ctypes.c_void_p(self.stream))
        host = self._created("alloc_host", ctypes.c_size_t(size))
        ctypes.memset(host, 0xFF, size)
        self._copy(pointer, host, size)
        self._free_host(host)
        return pointer

    def qn_simt_free(self, pointer: int) -> int:
        error: int = self._library.qn_gpu_free(
            ctypes.c_void_p(pointer), ctypes.c_void_p(self.stream)
        )
        return error

    def qn_simt_upload(self, to: int, source: int, size: int) -> int:
        if size == 0:
            return 0
        host = self._created("alloc_host", ctypes.c_size_t(size))
        ctypes.memmove(host, source, size)
        self._copy(to, host, size)
        self._free_host(host)
        return 0

    def qn_simt_download(self, to: Any, source: int, size: int) -> int:
        if size == 0:
            return 0
        host = self._created("alloc_host", ctypes.c_size_t(size))
        self._copy(host, source, size)
        ctypes.memmove(to, host, size)
        self._free_host(host)
        return 0


class Gpu(Simulator):
    """What tests see of a GPU; the same calls, without what the executor observes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ptx = None
        self.library: Any = _Memory(path)
        self.stream = self.library.stream
        self.buffers = []

    def reset(self) -> None:
        for buffer in self.buffers:
            self.library.check(self.library.qn_simt_free(buffer.pointer))
        self.buffers.clear()

    def configure(self, check: bool = True, count: bool = True, seed: int = 0) -> None:
        """The hardware decides the order of threads."""

    def call(self, launcher: str, *arguments: object) -> int:
        result = super().call(launcher, *arguments)
        self.library.sync()
        return result

    def compare_with_ptx(self, *sources: Path, include: Path = Path()) -> None:
        pytest.skip("PTX is compared with the executor")

    def counters(self) -> Counters:
        pytest.skip("counted by the executor")

    def line_traffic(self) -> list[LineTraffic]:
        pytest.skip("counted by the executor")

    def take_reports(self) -> list[Report]:
        return []

    def record_launches(self, on: bool = True) -> None:
        """Only the executor records."""

    def recorded_launches(self) -> list[Launch]:
        return []
