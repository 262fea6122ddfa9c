"""tools/gpu_bench.py and the kernels' tests on a GPU's library, tried out under the simulator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_simulator
import pytest
from cuda_simulator import ROOT


@pytest.fixture(scope="module")
def library() -> Path:
    if tool := cuda_simulator.missing_build_tool():
        pytest.skip(f"the CUDA simulator cannot be built: {tool} is missing")
    return cuda_simulator.build("qn_cuda_sim_fast")


def test_measurements(library, golden, tmp_path):
    (tmp_path / "checks.tsv").write_text("memcheck\tpassed: 3\n")
    outputs = [str(tmp_path / name) for name in ("out.json", "out.md")]
    command = [sys.executable, str(ROOT / "tools/gpu_bench.py"), str(library)]
    command += [str(golden / "qwen1-tiny"), *outputs, "--dry-run"]
    command += ["--checks", str(tmp_path / "checks.tsv")]
    environment = {**os.environ, "QN_SIM_MEMORY": str(1 << 29), "QN_PACKED_CACHE": "0"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    facts = json.loads(Path(outputs[0]).read_text())
    kernels = {row["kernel"] for row in facts["rows"]}
    assert kernels >= {"rms_norm", "gemm_int4", "attention_decode", "generate"}
    assert all(row["microseconds"] > 0 for row in facts["rows"])
    assert "- memcheck: passed: 3" in Path(outputs[1]).read_text()


def test_kernels_on_a_library_of_the_environment(library, tmp_path):
    """The same tests by way of gpu_rt.h; what only the executor sees is skipped, not passed."""
    # From another folder: in the checkout's, python would find the sources, which have no _C.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    command += [str(ROOT / "tests/cuda/test_rms_norm.py"), "-k", "traffic or tokens or order"]
    environment = {**os.environ, "QN_CUDA_LIBRARY": str(library)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout and "counted by the executor" in result.stdout


def test_the_script_is_valid():
    subprocess.run(["bash", "-n", str(ROOT / "tools/gpu_check.sh")], check=True)
