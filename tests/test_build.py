"""What the build promises: one version, every level, a stub that matches, no silent CPU build."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tools_module import ROOT

import qwen_native
from qwen_native import _C

LEVEL_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
    "avx512_bf16": ["-mavx512bf16"],
    "amx": ["-mavx512fp16", "-mgfni", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


def version_in(file: str, pattern: str) -> str:
    match = re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)
    assert match is not None, f"no version in {file}"
    return match[1]


def test_one_version():
    version = version_in("CMakeLists.txt", r"^project\(qwen_native VERSION (\S+)")
    assert version_in("pyproject.toml", r'^version = "(.+)"') == version
    assert qwen_native.__version__ == _C.__version__ == version


def test_every_level_that_the_compiler_has_is_built():
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler: c++ is missing")

    def accepts(flags: list[str]) -> bool:
        command = [compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert _C.built_isas() == [name for name, flags in LEVEL_FLAGS.items() if accepts(flags)]


def stub_names() -> dict[str, set[str]]:
    """Public names of _C.pyi: the module's under "", each class's under its own name."""
    tree = ast.parse((ROOT / "qwen_native/_C.pyi").read_text())
    names: dict[str, set[str]] = {"": set()}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[""].add(node.name)
        if isinstance(node, ast.AnnAssign) and getattr(node.annotation, "id", "") != "TypeAlias":
            names[""].add(ast.unparse(node.target))
        if isinstance(node, ast.ClassDef):
            members = names.setdefault(node.name, set())
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    members.add(item.name)
                elif isinstance(item, ast.AnnAssign):
                    members.add(ast.unparse(item.target))
    return names


def is_public(name: str) -> bool:
    return not name.startswith("_")


def test_stub_has_the_module_s_names():
    names = stub_names()
    assert set(filter(is_public, names[""])) == set(filter(is_public, vars(_C)))
    for name, members in names.items():
        if name:
            native = set(filter(is_public, vars(getattr(_C, name))))
            assert set(filter(is_public, members)) == native, name


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("no build tools: cmake or ninja is missing")
    command = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DQN_PYTHON=OFF"]
    environment = {**os.environ, **environment}
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )


def words(text: str) -> str:
    """The text without CMake's line breaks."""
    return " ".join(text.split())


def test_cuda_on_without_nvcc_is_an_error(tmp_path: Path):
    result = configure(tmp_path, "-DQN_CUDA=ON", CUDACXX="/nonexistent/nvcc")
    assert result.returncode != 0
    assert "QN_CUDA is ON, but no CUDA compiler was found" in words(result.stderr)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is missing")
def test_cuda_on_builds_the_library_that_the_extension_loads(tmp_path: Path):
    result = configure(tmp_path, "-DQN_CUDA=ON", "-DQN_CUDA_ARCHS=80-real;90-virtual")
    assert result.returncode == 0, result.stderr
    assert "CUDA libqn_cuda.so for 80-real;90-virtual by" in words(result.stdout)
    assert "libqn_cuda.so" in (tmp_path / "build.ninja").read_text()


def test_unknown_option_value_is_an_error(tmp_path: Path):
    result = configure(tmp_path, "-DQN_CUDA=MAYBE")
    assert result.returncode != 0
    assert "QN_CUDA is 'MAYBE', expected AUTO, ON or OFF" in words(result.stderr)


def test_simulator_is_built_on_request(tmp_path: Path):
    result = configure(tmp_path, "-DQN_CUDA_SIM=ON", "-DCMAKE_CXX_COMPILER=g++")
    assert result.returncode == 0, result.stderr
    targets = (tmp_path / "build.ninja").read_text()
    assert "libqn_cuda_sim.so" in targets and "libqn_cuda_sim_fast.so" in targets
