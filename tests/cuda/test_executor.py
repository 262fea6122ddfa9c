"""The SIMT executor finds the errors in errors.cu, where they are, and nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from cuda_simulator import CASES, Report, Simulator

SOURCE = (CASES / "errors.cu").read_text()
INTS, UNINITIALISED = 4096, 64


def expectations() -> dict[str, set[tuple[str, int]]]:
    """(kind, line) of every report that a kernel must give, by kernel."""
    expected: dict[str, set[tuple[str, int]]] = {}
    kernel = ""
    for number, line in enumerate(SOURCE.splitlines(), start=1):
        if start := re.match(r"KERNEL\((\w+),", line):
            kernel = start[1]
            expected[kernel] = set()
        if mark := re.search(r"// expect: (.*)", line):
            expected[kernel].update((kind, number) for kind in mark[1].split())
    return expected


EXPECTED = expectations()
LEGAL = [kernel for kernel, reports in EXPECTED.items() if not reports]


def run(cases: Simulator, kernel: str, seed: int = 0) -> list[Report]:
    cases.configure(seed=seed)
    data = cases.empty((INTS,), torch.int32)
    zeros = torch.zeros(INTS - UNINITIALISED, dtype=torch.int32)
    cases.library.qn_simt_upload(data.pointer, zeros.data_ptr(), zeros.nbytes)
    cases.call(kernel, data)
    return cases.take_reports()


def place(report: Report) -> int:
    """The line in errors.cu; launches that do not start have none."""
    if report.kind == "bad-launch":
        return next(line for kind, line in EXPECTED[report.kernel] if kind == "bad-launch")
    file, line = report.where.split(" < ")[0].split(":")
    assert file == "errors.cu", report
    return int(line)


@pytest.mark.parametrize("kernel", EXPECTED)
def test_reports_are_the_expected_ones(cases: Simulator, kernel: str):
    reports = run(cases, kernel)
    found = {(report.kind, place(report)) for report in reports}
    assert found == EXPECTED[kernel], "\n".join(map(str, reports))
    assert {report.kernel for report in reports} <= {kernel}


@pytest.mark.parametrize("kernel", EXPECTED)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_order_of_threads_shows_whether_there_is_an_error(
    cases: Simulator, kernel: str, seed: int
):
    reports = run(cases, kernel, seed)
    assert bool(reports) == bool(EXPECTED[kernel]), "\n".join(map(str, reports))


def test_every_error_has_a_legal_counterpart():
    assert len(LEGAL) >= 20
    assert {kind for reports in EXPECTED.values() for kind, _ in reports} == {
        "array-index-out-of-bounds",
        "bad-barrier",
        "bad-launch",
        "cp-async-never-waited-for",
        "cp-async-pending",
        "deadlock",
        "divergent-barrier",
        "divergent-warp",
        "endless-loop",
        "global-out-of-bounds",
        "global-race",
        "global-race-between-blocks",
        "global-uninitialised-read",
        "lane-outside-its-mask",
        "misaligned-access",
        "not-modelled",
        "not-shared-memory",
        "partial-warp",
        "read-only-data-written",
        "shared-out-of-bounds",
        "shared-race",
        "shared-uninitialised-read",
        "shuffle-from-absent-lane",
        "write-to-static-variable",
    }


def test_report_names_block_and_thread(cases: Simulator):
    (report,) = run(cases, "global_bounds_end")
    assert report.kernel == "global_bounds_end"
    assert (report.block, report.thread) == ((0, 0, 0), 31)
    (report,) = run(cases, "block_writes_what_others_read")
    assert (report.block, report.thread, report.occurrences) == ((2, 0, 0), 0, 32)


def test_a_launch_that_was_given_up_leaves_nothing_behind(cases: Simulator):
    for broken in ("barrier_not_reached", "copy_out_of_bounds", "spin_on_another_block"):
        assert run(cases, broken)
        assert run(cases, "shared_race_legal") == []


def test_unchecked_runs_report_nothing_of_memory(cases: Simulator):
    data = cases.upload(torch.zeros(INTS, dtype=torch.int32))
    cases.configure(check=False)
    assert cases.call("shared_race", data) == 0
    assert cases.take_reports() == []
