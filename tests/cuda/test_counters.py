"""The executor's counters on access patterns (traffic.cu) whose traffic follows from the hardware's
rules: sectors of 32 bytes; 32 banks of 4 bytes, and 8- and 16-byte accesses served in two and four
groups of lanes."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CASES, Counters, Simulator


def run(cases: Simulator, pattern: str) -> Counters:
    out, x = cases.upload(torch.zeros(1024)), cases.upload(torch.zeros(1024))
    assert cases.call(pattern, out, x) == 0
    return cases.counters()


@pytest.mark.parametrize(
    ("pattern", "requests", "sectors", "needed", "distinct"),
    [
        ("load_packed", 1, 4, 4, 4),
        ("load_vectors", 1, 16, 16, 16),
        ("load_broadcast", 1, 1, 1, 1),
        ("load_shifted", 1, 5, 4, 5),
        ("load_strided", 1, 32, 4, 32),
        ("load_by_some_lanes", 1, 4, 1, 4),
        ("load_in_divergent_loop", 2, 4 + 2, 4 + 2, 6),
        ("load_twice", 2 * 2 * 2, 8 * 4, 8 * 4, 8),
        ("copy_async", 1, 16, 16, 16),
    ],
)
def test_loads(
    cases: Simulator, pattern: str, requests: int, sectors: int, needed: int, distinct: int
):
    counted = run(cases, pattern)
    assert counted.load_requests == requests
    assert counted.load_sectors == sectors
    assert counted.load_sectors_needed == needed
    assert counted.distinct_load_sectors == distinct
    assert counted.store_requests == 0


@pytest.mark.parametrize(
    ("pattern", "sectors", "needed", "written"),
    [
        ("store_packed", 4, 4, 128),
        ("store_strided", 32, 4, 128),
        ("store_halves", 16, 8, 256),
    ],
)
def test_stores(cases: Simulator, pattern: str, sectors: int, needed: int, written: int):
    counted = run(cases, pattern)
    assert (counted.store_requests, counted.store_sectors) == (1, sectors)
    assert (counted.store_sectors_needed, counted.store_bytes) == (needed, written)
    assert counted.distinct_store_sectors == sectors


@pytest.mark.parametrize(
    ("pattern", "wavefronts", "needed"),
    [
        ("shared_packed", 1, 1),
        ("shared_stride_4", 4, 1),
        ("shared_stride_33", 1, 1),
        ("shared_column", 32, 1),
        ("shared_pairs", 2, 2),
        ("shared_vectors", 4, 4),
        ("shared_vector_column", 32, 4),
        ("shared_vector_swizzled", 4, 4),
        ("copy_async", 4, 4),
    ],
)
def test_bank_conflicts(cases: Simulator, pattern: str, wavefronts: int, needed: int):
    counted = run(cases, pattern)
    assert counted.shared_requests == 1
    assert counted.shared_wavefronts == wavefronts
    assert counted.shared_wavefronts_needed == needed


@pytest.mark.parametrize(
    ("pattern", "wavefronts"), [("ldmatrix_column", 32), ("ldmatrix_swizzled", 4)]
)
def test_bank_conflicts_of_ldmatrix(cases: Simulator, pattern: str, wavefronts: int):
    counted = run(cases, pattern)
    assert (counted.ldmatrix, counted.ldmatrix_wavefronts) == (1, wavefronts)


def test_traffic_is_known_by_line(cases: Simulator):
    run(cases, "store_strided")
    (line,) = cases.line_traffic()
    source = (CASES / "traffic.cu").read_text().splitlines()
    assert "threadIdx.x * 8] = 1.0f" in source[int(line.where.split(":")[1]) - 1]
    assert (line.shared, line.write, line.requests) == (False, True, 1)
    assert (line.units, line.units_needed, line.bytes) == (32, 4, 128)


def test_nothing_is_counted_when_switched_off(cases: Simulator):
    cases.configure(count=False)
    counted = run(cases, "load_strided")
    assert (counted.launches, counted.blocks, counted.load_requests) == (1, 1, 0)
