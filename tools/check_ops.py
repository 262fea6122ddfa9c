#!/usr/bin/env python3
"""Check that one name runs through all layers.

Op `x` means: declared in csrc/ops/ops.h, defined in csrc/ops/x.cpp, a function of
qwen_native/ops.py, tests/kernels/test_x.py, a case "x" of benchmarks/kernels.py, an entry of
CpuKernels that csrc/kernels/cpu/x.cpp defines. GROUPS lists the exceptions: ops that share a file
or fan out below it.

usage: check_ops.py [ROOT]     prints one line per violation and exits with 1 when there is any
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Group:
    """Ops that share csrc/ops/<stem>.cpp, tests/kernels/test_<stem>.py and benchmark cases."""

    ops: tuple[str, ...]
    kernels: dict[str, str] = field(
        default_factory=dict
    )  # entry of CpuKernels: file in kernels/cpu


GROUPS = {
    "rms_norm_bwd": Group(
        ("rms_norm_bwd",),
        {"rms_norm_bwd": "rms_norm_bwd", "rms_norm_bwd_weight": "rms_norm_bwd"},
    ),
    "linear": Group(
        ("linear",),
        {
            "gemm_f32": "gemm_float",
            "gemm_bf16": "gemm_float",
            "gemm_bf16_workspace": "gemm_float",
            "gemm_bf16_pack_x": "gemm_float",
            "quantize_activations": "quantize_activations",
            "gemm_int8_grouped": "gemm_int8_grouped",
            "gemm_int4": "gemm_int4",
            "fold_activations": "fold_activations",
            "gemm_int8": "gemm_int8",
            "gemm_folded": "gemm_folded",
        },
    ),
    "mlp": Group(("mlp",), {"gated_gemm_folded": "gated_gemm_folded"}),
    "attention": Group(
        ("attention", "kv_append"),
        {"attention": "attention", "attention_merge": "attention", "kv_append": "kv_append"},
    ),
    "quantize": Group(
        ("pack_weight", "decode_source", "unpack_weight"),
        {"quantize": "quantize", "repack": "repack", "decode_source": "decode_source"},
    ),
    "packed_attention": Group(
        ("packed_attention", "packed_attention_bwd"),
        {
            "packed_attention": "packed_attention",
            "packed_attention_bwd": "packed_attention",
            "packed_attention_bwd_sum": "packed_attention",
        },
    ),
    "matmul": Group(("matmul",), {"matmul": "matmul", "matmul_pack": "matmul"}),
    "sampling": Group(
        ("argmax", "log_sum_exp"), {"block_max": "sampling", "block_exp_sum": "sampling"}
    ),
}
INSTRUMENTS = {"probe"}  # kernels that measure the machine, for benchmarks
NATIVE_PARTS = {
    *("block_max", "block_exp_sum"),  # of sampling, called by the runtime only
    "append_qkv",  # other ops one after the other; on a GPU one kernel
}
QUERIES = {  # in ops.h, but compute nothing
    "weight_bytes",
    "source_bytes",
    "kv_page_bytes",
    "has_matmul",
    "token_cost",
    "folded_tokens",
    "weight_format_from_name",
    "source_type_from_name",
}


def read(path: Path) -> str:
    """The file's text, empty when there is none (which the patterns then miss)."""
    return path.read_text() if path.is_file() else ""


def entries_of(kernels_h: str) -> list[str]:
    """Names of the function pointers in CpuKernels."""
    body = re.search(r"struct CpuKernels \{(.*?)\n\};", kernels_h, re.DOTALL)
    return re.findall(r"\(\*(\w+)\)\s*\(", body[1]) if body else []


def violations(root: Path) -> list[str]:
    """What is missing, as "name: ..." lines."""
    found = []
    cpu = root / "csrc/kernels/cpu"
    entries = entries_of(read(cpu / "kernels.h"))
    declared = re.findall(r"^\w[\w ]*?\b(\w+)\(", read(root / "csrc/ops/ops.h"), re.MULTILINE)
    ops = [name for name in dict.fromkeys(declared) if name not in QUERIES | NATIVE_PARTS]
    stem_of = {op: stem for stem, group in GROUPS.items() for op in group.ops}
    file_of = {entry: file for group in GROUPS.values() for entry, file in group.kernels.items()}
    if not entries or not ops:
        return ["csrc: no CpuKernels or no ops found"]

    for entry in entries:
        if entry not in {*file_of, *ops, *INSTRUMENTS}:
            found.append(f"{entry}: an entry of CpuKernels that is neither an op nor in GROUPS")
        file = cpu / f"{file_of.get(entry, entry)}.cpp"
        if not re.search(rf"^\w[\w ]*\b{entry}\(", read(file), re.MULTILINE):
            found.append(f"{entry}: not defined in {file.relative_to(root)}")
    known_files = {file_of.get(entry, entry) for entry in entries} | {"table", "dispatch"}
    for file in sorted(cpu.glob("*.cpp")):
        if file.stem not in known_files:
            found.append(f"{file.relative_to(root)}: defines no entry of CpuKernels")

    python, bench = read(root / "qwen_native/ops.py"), read(root / "benchmarks/kernels.py")
    for op in ops:
        stem = stem_of.get(op, op)
        tests = "".join(read(root / f"tests/kernels/test_{name}.py") for name in (stem, op))
        if not re.search(rf"^\w[\w ]*\b{op}\(", read(root / f"csrc/ops/{stem}.cpp"), re.MULTILINE):
            found.append(f"{op}: not defined in csrc/ops/{stem}.cpp")
        if not re.search(rf"^def {op}\(", python, re.MULTILINE):
            found.append(f"{op}: no function in qwen_native/ops.py")
        if not re.search(rf"\b{op}\(", tests):
            found.append(f"{op}: not called in tests/kernels/test_{stem}.py")
        if not re.search(rf'"({op}|{stem})\b', bench):
            found.append(f'{op}: no case "{op}" or "{stem}" in benchmarks/kernels.py')
    return found


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = violations(root)
    print("\n".join(found) or "ops: one name everywhere")  # noqa: T201
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
