"""tools/cuda_gate.py: red for planted spills, local stacks, missing figures and instructions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools_module import load_tool

gate = load_tool("cuda_gate")

GOOD = """
__global__ __launch_bounds__(128) void copy_kernel(uint4* to, const uint4* from) {
  to[threadIdx.x] = from[threadIdx.x];
}
"""
# 8 blocks of 256 threads leave 32 registers for 64 values that are all alive at once.
SPILLS = """
__global__ __launch_bounds__(256, 8) void copy_kernel(float* to, const float* from) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = from[i * 256 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) to[i * 256 + threadIdx.x] = v[i] * v[(i * 7 + 5) % 64];
}
"""
STACK = """
__global__ __launch_bounds__(128) void copy_kernel(int* to, const int* from) {
  int v[32];
  for (int i = 0; i < 32; ++i) v[from[i] & 31] = i;
  to[threadIdx.x] = v[from[threadIdx.x] & 31];
}
"""
FIGURES = {"threads": 128, "shared": 0, "registers": 32, "blocks": 8, "needs": []}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the gate on one source; returns (exit status, output)."""
    if tool := gate.missing_tool():
        pytest.skip(f"{tool} is missing")
    monkeypatch.setattr(gate, "BUILD", tmp_path / "build")
    monkeypatch.setattr(gate, "SHARED", {"sm_80": gate.SHARED["sm_80"]})

    def run(source: str, **changes: object) -> tuple[int, str]:
        (tmp_path / "kernel.cu").write_text(f"#include <stdint.h>\n{source}")
        kernels = {"copy_kernel": {**FIGURES, **changes}} if changes.get("known", True) else {}
        (tmp_path / "figures.json").write_text(json.dumps({"kernels": kernels}))
        arguments = ["--figures", str(tmp_path / "figures.json"), str(tmp_path / "kernel.cu")]
        monkeypatch.setattr("sys.argv", ["cuda_gate.py", *arguments])
        status = gate.main()
        return status, capsys.readouterr().out

    return run


def test_a_kernel_as_declared_passes(run):
    status, output = run(GOOD, needs=["load16", "store16"])
    assert status == 0, output


def test_a_planted_spill_is_red(run):
    status, output = run(SPILLS, threads=256, registers=255, blocks=1)
    assert status == 1 and "copy_kernel spills" in output


def test_a_local_stack_is_red(run):
    status, output = run(STACK)
    assert status == 1 and "bytes of stack in local memory" in output


def test_figures_are_compared(run):
    status, output = run(GOOD, needs=["mma"], registers=4, blocks=17)
    assert status == 1
    assert "registers, at most 4 allowed" in output
    assert "16 blocks fit on a multiprocessor, expected at least 17" in output
    assert "has no mma" in output


def test_a_kernel_without_figures_is_red(run):
    status, output = run(GOOD, known=False)
    assert status == 1 and "copy_kernel has no figures in figures.json" in output


def test_occupancy():
    kernel = gate.Kernel(registers=128)
    assert gate.resident_blocks(kernel, 128, 0, "sm_80") == 4  # 4 x 16384 registers
    assert gate.resident_blocks(kernel, 128, 60 << 10, "sm_80") == 2
    assert gate.resident_blocks(kernel, 128, 60 << 10, "sm_90") == 3
    assert gate.resident_blocks(gate.Kernel(registers=32), 256, 0, "sm_80") == 8  # 2048 threads


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void qn::cuda::gemm_kernel<qn::cuda::(anonymous namespace)::Int4Weight<false>, 16>"
            "(qn::cuda::GemmArgs, qn::cuda::GemmPlan)",
            "gemm_kernel<Int4Weight<false>, 16>",
        ),
        (
            "void qn::cuda::(anonymous namespace)::k<qn::cuda::Cache<64> >(qn::cuda::Args)",
            "k<Cache<64>>",
        ),
        ("qn::cuda::(anonymous namespace)::rope_kernel(qn::cuda::RopeKvArgs)", "rope_kernel"),
        ("void qn::cuda::(anonymous namespace)::k<float, qn::bf16>(int*)", "k<float, bf16>"),
    ],
)
def test_short_names(demangled, short):
    assert gate.short_name(demangled) == short
