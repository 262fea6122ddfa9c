"""tools/check_layers.py finds planted violations and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools_module import ROOT, load_tool

check_layers = load_tool("check_layers")


def test_the_tree_is_clean():
    assert check_layers.violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/core/a.h", '#include "kernels/args.h"'),
        ("csrc/kernels/cpu/a.cpp", "#include <vector>"),
        ("csrc/kernels/cpu/a.cpp", '#include "core/error.h"'),
        ("csrc/kernels/args.h", "#include <cstdint>"),
        ("csrc/ops/a.cpp", '#include "model/qwen.h"'),
        ("csrc/ops/a.cpp", "#include <Python.h>"),
        ("csrc/model/qwen.cpp", '#include "kernels/cpu/kernels.h"'),
        ("csrc/model/qwen.cpp", '#include "runtime/engine.h"'),
        ("csrc/model/qwen.cpp", "  #  include <pybind11/pybind11.h>"),
        ("csrc/runtime/scheduler.h", '#include "core/tensor.h"'),
        ("python/bind_ops.cpp", '#include "kernels/cpu/dispatch.h"'),
        ("python/bind_ops.cpp", "#include <torch/extension.h>"),
        ("qwen_native/llm.py", "import torch"),
        ("qwen_native/llm.py", "    from torch.nn import functional"),
        ("qwen_native/llm.py", "import transformers"),
        ("qwen_native/llm.py", "from qwen_native import server"),
        ("qwen_native/llm.py", "from qwen_native.train.ppo import run"),
    ],
)
def test_violation_is_found(tmp_path: Path, path: str, line: str):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(f"{line}\n")
    found = check_layers.violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("csrc/kernels/cpu/a.cpp", '#include "kernels/cpu/vec.h"'),
        ("csrc/kernels/cpu/dispatch.cpp", "#include <vector>"),
        ("csrc/model/qwen.cpp", '#include "kernels/quant_layout.h"'),
        ("python/bind_core.cpp", '#include "kernels/cpu/dispatch.h"'),
        ("qwen_native/nn.py", "import torch"),
        ("qwen_native/train/ppo.py", "from qwen_native.train.common import gae"),
    ],
)
def test_allowed(tmp_path: Path, path: str, line: str):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(f"{line}\n")
    assert check_layers.violations(tmp_path) == []
