"""Fixtures of the CUDA kernels' tests."""

from __future__ import annotations

import json
from collections.abc import Iterator

import cuda_simulator
import pytest
from cuda_arrays import Caller
from cuda_gpu import Gpu, library_of_environment
from cuda_simulator import ROOT, Launch, Simulator
from tools_module import load_tool

from qwen_native import _C

short_name = load_tool("cuda_gate").short_name


def _library(target: str) -> Simulator:
    if library_of_environment() is not None:
        pytest.skip("needs the executor; QN_CUDA_LIBRARY names a GPU's library")
    if tool := cuda_simulator.missing_build_tool():
        pytest.skip(f"the CUDA simulator cannot be built: {tool} is missing")
    return Simulator(cuda_simulator.build(target))


@pytest.fixture(scope="session")
def checked_library() -> Simulator:
    if path := library_of_environment():
        return Gpu(path)
    return _library("qn_cuda_sim")


@pytest.fixture(scope="session")
def cases_library() -> Simulator:
    return _library("qn_simt_cases")


@pytest.fixture(scope="session")
def fast_cases_library() -> Simulator:
    return _library("qn_simt_cases_fast")


@pytest.fixture(scope="session")
def figures() -> dict[str, dict[str, int]]:
    """What tools/cuda_gate.py takes for granted of every kernel's launches."""
    kernels: dict[str, dict[str, int]] = json.loads((ROOT / "tools/cuda_gate.json").read_text())[
        "kernels"
    ]
    return kernels


def _check_launch(launch: Launch, figures: dict[str, dict[str, int]]) -> None:
    name = short_name(launch.kernel)
    threads, shared = launch.block[0], launch.shared_bytes
    declared = figures[name]["threads"], figures[name]["shared"]
    assert (threads, shared) == declared, f"{name}: tools/cuda_gate.json says {declared}"


def _clean(simulator: Simulator) -> Iterator[Simulator]:
    simulator.reset()
    try:
        yield simulator
        reports = simulator.take_reports()
    finally:
        simulator.reset()
    assert not reports, "\n" + "\n".join(map(str, reports))


@pytest.fixture
def sim(checked_library: Simulator, figures: dict[str, dict[str, int]]) -> Iterator[Simulator]:
    """The kernels under the SIMT executor; every report that a test leaves behind fails it."""
    for simulator in _clean(checked_library):
        simulator.record_launches()
        yield simulator
        launches = simulator.recorded_launches()
    for launch in launches:
        _check_launch(launch, figures)


@pytest.fixture
def cases(cases_library: Simulator) -> Iterator[Simulator]:
    """Like `sim`, with the kernels of tests/cuda/*.cu instead."""
    yield from _clean(cases_library)


@pytest.fixture
def fast_cases(fast_cases_library: Simulator) -> Iterator[Simulator]:
    """Like `cases`, without checks of memory accesses."""
    yield from _clean(fast_cases_library)


@pytest.fixture
def gpu(sim: Simulator) -> Iterator[Caller]:
    """The op GPU is the simulator; a caller of ops there."""
    _C.set_op_gpu(_C.Gpu(str(sim.path)))
    caller = Caller(sim)
    try:
        yield caller
    finally:
        caller.close()
        _C.set_op_gpu(None)
