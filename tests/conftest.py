"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from qwen_native import _C, ops

# Temporary checkpoints would leave packed files in the user's cache. Tests of packed files have a
# cache of their own.
os.environ["QN_PACKED_CACHE"] = "0"

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("QN_SHARED", ROOT.parent / "shared"))


@pytest.fixture(params=ops.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once for every level that this host has."""
    before = _C.active_isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@contextmanager
def walking_panels(streams: int) -> Iterator[None]:
    before = _C.memory_streams()
    _C.set_memory_streams(streams)
    yield
    _C.set_memory_streams(before)


@pytest.fixture(params=[2, 4])
def memory_streams(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test as on AMD's processors and as on Intel's: they differ in how few tokens walk
    panels and in from how many tokens on weights are folded."""
    with walking_panels(request.param):
        yield


@pytest.fixture
def folded_from_8() -> Iterator[None]:
    """4-bit weights are folded from 8 tokens on, int8 from 6, whatever this processor prefers."""
    with walking_panels(4):
        yield


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20230928)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of data computed by independent implementations."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden data: {folder} is missing")
    return folder
