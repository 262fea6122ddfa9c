"""tools/check_isa_objects.py finds a planted symbol that two levels would share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools_module import ROOT

SHARED_INLINE = """
namespace qn { template <typename T> T twice(T x) { return x + x; } }
namespace qn::cpu::avx2 { float kernel(float x) { return qn::twice(x); } }
"""
OWN_INLINE = """
namespace qn::cpu::avx2 {
template <typename T> T twice(T x) { return x + x; }
float kernel(float x) { return twice(x); }
}
"""


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tools/check_isa_objects.py"
    return subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False
    )


def compile_kernel(folder: Path, source: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler: c++ is missing")
    objects = folder / "CMakeFiles/qn_kernels_avx2.dir/csrc"
    objects.mkdir(parents=True)
    (folder / "kernel.cpp").write_text(source)
    subprocess.run(
        [compiler, "-O0", "-c", str(folder / "kernel.cpp"), "-o", str(objects / "kernel.cpp.o")],
        check=True,
    )


def test_shared_symbol_is_found(tmp_path: Path):
    compile_kernel(tmp_path, SHARED_INLINE)
    result = run(tmp_path)
    assert result.returncode == 1
    assert "kernel.cpp.o (avx2): float qn::twice<float>(float)" in result.stdout


def test_own_symbols_pass(tmp_path: Path):
    compile_kernel(tmp_path, OWN_INLINE)
    result = run(tmp_path)
    assert (result.returncode, result.stdout) == (
        0,
        "isa objects: 1 objects share no weak symbol\n",
    )


def test_empty_folder_is_an_error(tmp_path: Path):
    result = run(tmp_path)
    assert result.returncode == 1
    assert "expected qn_kernels_" in result.stdout
