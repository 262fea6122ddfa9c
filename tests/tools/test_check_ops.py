"""tools/check_ops.py finds a name that is missing in one layer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools_module import load_tool

check_ops = load_tool("check_ops")

FILES = {
    "csrc/kernels/cpu/kernels.h": """
struct CpuKernels {
  void (*swiglu)(const SwigluArgs&, int64_t begin, int64_t end);
  void (*gemm_int8)(const GemmArgs&, int64_t begin,
                    int64_t end);  // panels
};
""",
    "csrc/kernels/cpu/swiglu.cpp": "void swiglu(const SwigluArgs& args) {}\n",
    "csrc/kernels/cpu/gemm_int8.cpp": "void gemm_int8(const GemmArgs& args) {}\n",
    "csrc/kernels/cpu/table.cpp": "void fill(CpuKernels& table) {}\n",
    "csrc/ops/ops.h": "/// size\nsize_t weight_bytes(int rows);\nvoid swiglu(int x);\n"
    "void linear(int x,\n            int y);\n",
    "csrc/ops/swiglu.cpp": "void swiglu(int x) {}\n",
    "csrc/ops/linear.cpp": "void linear(int x, int y) {}\n",
    "qwen_native/ops.py": "def swiglu(x):\n    pass\n\n\ndef linear(x):\n    pass\n",
    "tests/kernels/test_swiglu.py": "ops.swiglu(1)\n",
    "tests/kernels/test_linear.py": "ops.linear(1)\n",
    "benchmarks/kernels.py": 'Case("swiglu")\nCase("linear int8")\n',
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_complete_tree_passes(tree: Path):
    assert check_ops.violations(tree) == []


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("csrc/kernels/cpu/swiglu.cpp", "swiglu: not defined in csrc/kernels/cpu/swiglu.cpp"),
        (
            "csrc/kernels/cpu/gemm_int8.cpp",
            "gemm_int8: not defined in csrc/kernels/cpu/gemm_int8.cpp",
        ),
        ("csrc/ops/linear.cpp", "linear: not defined in csrc/ops/linear.cpp"),
        ("tests/kernels/test_swiglu.py", "swiglu: not called in tests/kernels/test_swiglu.py"),
    ],
)
def test_missing_file_is_found(tree: Path, missing: str, message: str):
    (tree / missing).unlink()
    assert check_ops.violations(tree) == [message]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("qwen_native/ops.py", "swiglu: no function in qwen_native/ops.py"),
        ("benchmarks/kernels.py", 'swiglu: no case "swiglu" or "swiglu" in benchmarks/kernels.py'),
    ],
)
def test_missing_name_is_found(tree: Path, path: str, message: str):
    file = tree / path
    file.write_text(file.read_text().replace("swiglu", "silu"))
    assert check_ops.violations(tree) == [message]


def test_stray_kernel_file_and_entry_are_found(tree: Path):
    (tree / "csrc/kernels/cpu/extra.cpp").write_text("")
    header = tree / "csrc/kernels/cpu/kernels.h"
    header.write_text(header.read_text().replace("\n};", "\n  void (*lost)(int);\n};"))
    assert check_ops.violations(tree) == [
        "lost: an entry of CpuKernels that is neither an op nor in GROUPS",
        "lost: not defined in csrc/kernels/cpu/lost.cpp",
        "csrc/kernels/cpu/extra.cpp: defines no entry of CpuKernels",
    ]
