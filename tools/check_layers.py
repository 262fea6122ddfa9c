#!/usr/bin/env python3
"""Check who includes and imports whom (docs/ARCHITECTURE.md, "Include rules").

usage: check_layers.py [ROOT]     prints one line per violation and exits with 1 when there is any
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LAYERS = ["core", "kernels", "ops", "model", "runtime"]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+import\s+([\w, ]+)|import\s+([\w.]+))", re.MULTILINE)

ISA_ANGLE = {"stdint.h", "stddef.h", "math.h", "string.h", "immintrin.h"}
ISA_QUOTED = re.compile(
    r"core/dtype\.h|kernels/(args|scalar|quant_layout)\.h|kernels/cpu/(kernels|vec\w*|(amx|vnni|avx2|folded|attention)_\w+)\.h"
)
# Plain enums and layouts that the ops' signatures use, and what `info` reports.
KERNEL_VOCABULARY = {"kernels/quant_layout.h"}
MAY_SEE_KERNELS = {
    "csrc/model/linear.cpp": re.compile(r"kernels/"),  # asks for the packing table
    "python/bind_core.cpp": re.compile(
        r"kernels/cpu/dispatch\.h"  # what `info` reports
    ),
}
INTEGER_LOGIC = re.compile(r"csrc/runtime/(scheduler|page_pool|sequence|prompt_lookup)\.(h|cpp)")
USES_TORCH = re.compile(r"qwen_native/(reference|autograd|nn|export|train/\w+)\.py")


def is_isa_file(path: str) -> bool:
    """Whether `path` is compiled once per ISA level (or included by such a file)."""
    in_cpu = path.startswith("csrc/kernels/cpu/") and "/dispatch." not in path
    return in_cpu or path in {f"csrc/kernels/{n}.h" for n in ("args", "scalar", "quant_layout")}


def check_include(path: str, bracket: str, name: str) -> str | None:
    """What is wrong with `#include name` in `path`, or None."""
    if re.match(r"torch/|ATen/|c10/", name):
        return "torch is included nowhere"
    if path.startswith("csrc/") and re.match(r"Python\.h|pybind11/", name):
        return "csrc knows nothing of Python"
    if is_isa_file(path):
        known = name in ISA_ANGLE if bracket == "<" else ISA_QUOTED.fullmatch(name)
        return None if known else "ISA objects use only the shared headers and C headers"
    layer = name.split("/")[0]
    if bracket == "<" or layer not in LAYERS:
        return None
    if path.startswith("csrc/"):
        own = path.split("/")[1]
        if own in LAYERS and LAYERS.index(layer) > LAYERS.index(own):
            return f"{own} comes before {layer}"
    above_ops = not re.match(r"csrc/(kernels|ops)/|tests/", path)
    exception = MAY_SEE_KERNELS.get(path)
    allowed = name in KERNEL_VOCABULARY or (exception is not None and exception.match(name))
    if layer == "kernels" and above_ops and not allowed:
        return "only ops includes kernels"
    if INTEGER_LOGIC.fullmatch(path) and name == "core/tensor.h":
        return "this file is integer logic without tensors"
    return None


def check_import(path: str, module: str) -> str | None:
    """What is wrong with importing `module` in `path`, or None."""
    top = module.split(".")[0]
    if top == "transformers":
        return "transformers is for tests only"
    if top == "torch" and not USES_TORCH.fullmatch(path):
        return "inference works without torch"
    upper = re.match(r"qwen_native\.(train|server)\b", module)
    if upper and not path.startswith((f"qwen_native/{upper[1]}/", "qwen_native/cli.py")):
        return f"the package never imports {upper[1]}"
    return None


def violations(root: Path) -> list[str]:
    """Every forbidden include and import under `root`, as "path: ..." lines."""
    found = []
    for folder in ("csrc", "python", "tests/cpp"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
                continue
            path = file.relative_to(root).as_posix()
            for bracket, name in INCLUDE.findall(file.read_text()):
                if wrong := check_include(path, bracket, name):
                    found.append(f"{path}: includes {name}: {wrong}")
    for file in sorted((root / "qwen_native").rglob("*.py")):
        path = file.relative_to(root).as_posix()
        for source, names, plain in IMPORT.findall(file.read_text()):
            modules = (
                [f"{source}.{name.strip()}" for name in names.split(",")] if source else [plain]
            )
            for module in modules:
                if wrong := check_import(path, module):
                    found.append(f"{path}: imports {module}: {wrong}")
    return found


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = violations(root)
    print("\n".join(found) or "layers: every include and import is allowed")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
