"""csrc/kernels/cuda/simt/gpu_rt.cpp: work waits in its stream, and mistakes are errors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
from cuda_gpu import library_of_environment
from cuda_simulator import Simulator

OUT_OF_MEMORY, BAD_POINTER, CAPTURING, NOT_CAPTURING = 2, 3, 4, 5


class Runtime:
    """The runtime's functions by name, with one stream."""

    def __init__(self, simulator: Simulator) -> None:
        self.library = simulator.library
        self.stream = self.out("stream_create")

    def call(self, name: str, *arguments: object) -> int:
        converted = [
            ctypes.c_size_t(value) if isinstance(value, int) else value for value in arguments
        ]
        result: int = getattr(self.library, f"qn_gpu_{name}")(*converted)
        return result

    def out(self, name: str, *arguments: object) -> int:
        """What a function writes through its first argument."""
        pointer = ctypes.c_void_p()
        assert self.call(name, ctypes.byref(pointer), *arguments) == 0
        assert pointer.value is not None
        return pointer.value

    def capture_end(self) -> int:
        pointer = ctypes.c_void_p()
        assert self.call("capture_end", self.stream, ctypes.byref(pointer)) == 0
        assert pointer.value is not None
        return pointer.value

    def sync(self) -> int:
        return self.call("stream_sync", self.stream)


@pytest.fixture
def gpu(checked_library: Simulator) -> Iterator[Runtime]:
    if library_of_environment() is not None:
        pytest.skip("a GPU has errors of its own")
    runtime = Runtime(checked_library)
    yield runtime
    assert runtime.call("stream_destroy", runtime.stream) == 0


def read(pointer: int) -> bytes:
    return ctypes.string_at(pointer, 4)


def test_copies_happen_when_waited_for(gpu):
    host, device = gpu.out("alloc_host", 4), gpu.out("alloc", 4, gpu.stream)
    back, event = gpu.out("alloc_host", 4), gpu.out("event_create")
    ctypes.memmove(host, b"one!", 4)
    ctypes.memmove(back, b"none", 4)
    assert gpu.call("copy", device, host, 4, gpu.stream) == 0
    assert gpu.call("event_record", event, gpu.stream) == 0
    assert gpu.call("copy", back, device, 4, gpu.stream) == 0
    assert gpu.call("event_sync", event) == 0
    assert read(back) == b"none"
    ctypes.memmove(host, b"two!", 4)  # the first copy is done
    assert gpu.sync() == 0
    assert read(back) == b"one!"
    for pointer in (host, back):
        assert gpu.call("free_host", pointer) == 0
    assert gpu.call("free", device, gpu.stream) == 0
    assert gpu.call("event_destroy", event) == 0


def test_a_graph_replays_with_the_pointers_of_its_capture(gpu):
    host, device = gpu.out("alloc_host", 4), gpu.out("alloc", 4, gpu.stream)
    back = gpu.out("alloc_host", 4)
    assert gpu.call("capture_begin", gpu.stream) == 0
    assert gpu.call("copy", device, host, 4, gpu.stream) == 0
    assert gpu.call("copy", back, device, 4, gpu.stream) == 0
    assert gpu.sync() == CAPTURING
    pointer = ctypes.c_void_p()
    assert gpu.call("alloc", ctypes.byref(pointer), 4, gpu.stream) == CAPTURING
    assert gpu.call("capture_begin", gpu.stream) == CAPTURING
    graph = gpu.capture_end()
    for text in (b"abcd", b"efgh"):
        ctypes.memmove(host, text, 4)
        assert gpu.call("graph_launch", graph, gpu.stream) == 0
        assert gpu.sync() == 0
        assert read(back) == text
    assert gpu.call("graph_destroy", graph) == 0
    for buffer in (host, back):
        assert gpu.call("free_host", buffer) == 0
    assert gpu.call("free", device, gpu.stream) == 0


def test_mistakes(gpu, monkeypatch):
    device = gpu.out("alloc", 4, gpu.stream)
    pageable = ctypes.create_string_buffer(8)
    assert gpu.call("copy", device, ctypes.addressof(pageable), 4, gpu.stream) == 0
    assert gpu.sync() == BAD_POINTER
    assert gpu.call("free", device, gpu.stream) == 0
    assert gpu.call("free", device, gpu.stream) == BAD_POINTER
    pointer = ctypes.c_void_p()
    assert gpu.call("capture_end", gpu.stream, ctypes.byref(pointer)) == NOT_CAPTURING
    monkeypatch.setenv("QN_SIM_MEMORY", "1000")
    assert gpu.call("alloc", ctypes.byref(pointer), 1001, gpu.stream) == OUT_OF_MEMORY
