"""Fixtures of the CUDA kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_simulator
import pytest
from cuda_simulator import Simulator


def _library(target: str) -> Simulator:
    if tool := cuda_simulator.missing_build_tool():
        pytest.skip(f"the CUDA simulator cannot be built: {tool} is missing")
    return Simulator(cuda_simulator.build(target))


@pytest.fixture(scope="session")
def checked_library() -> Simulator:
    return _library("qn_cuda_sim")


@pytest.fixture(scope="session")
def cases_library() -> Simulator:
    return _library("qn_simt_cases")


@pytest.fixture(scope="session")
def fast_cases_library() -> Simulator:
    return _library("qn_simt_cases_fast")


def _clean(simulator: Simulator) -> Iterator[Simulator]:
    simulator.reset()
    try:
        yield simulator
        reports = simulator.take_reports()
    finally:
        simulator.reset()
    assert not reports, "\n" + "\n".join(map(str, reports))


@pytest.fixture
def sim(checked_library: Simulator) -> Iterator[Simulator]:
    """The kernels under the SIMT executor; every report that a test leaves behind fails it."""
    yield from _clean(checked_library)


@pytest.fixture
def cases(cases_library: Simulator) -> Iterator[Simulator]:
    """Like `sim`, with the kernels of tests/cuda/*.cu instead."""
    yield from _clean(cases_library)


@pytest.fixture
def fast_cases(fast_cases_library: Simulator) -> Iterator[Simulator]:
    """Like `cases`, without checks of memory accesses."""
    yield from _clean(fast_cases_library)
