#!/usr/bin/env python3
"""Check what nvcc makes of the CUDA kernels, without a GPU.

Compiles csrc/kernels/cuda/*.cu for sm_80 and sm_90 and compares every kernel with the figures of
tools/cuda_gate.json: no spills, no stack in local memory, registers within the limit, as many
resident blocks per multiprocessor as declared, and the instructions that the kernel needs (16-byte
accesses, tensor cores) in its disassembly. A kernel without figures is an error, and so are figures
without a kernel. Results are kept in build/cuda_gate for sources that do not change.

usage: cuda_gate.py [--figures FILE] [--list] [SOURCE.cu ...]
  --list     print what was found for every kernel
  Needs nvcc (on PATH, or named by CUDACXX), c++filt, and cuobjdump (pip: nvidia-cuda-cuobjdump).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build/cuda_gate"
FIGURES = ROOT / "tools/cuda_gate.json"
FLAGS = ["-std=c++20", "-O3", f"-I{CSRC}", "-lineinfo", "-Xptxas", "-v"]

# Of one multiprocessor: 32-bit registers, bytes of shared memory that blocks can have (each block
# costs 1 KB more), threads.
REGISTERS, THREADS, RESERVED_SHARED = 65536, 2048, 1024
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10}

# What a kernel may need: the instructions that provide it, as prefixes in the disassembly.
INSTRUCTIONS = {
    "load16": re.compile(r"LDG\.E(\.\w+)*\.128|LDGSTS\.E(\.\w+)*\.128"),
    "store16": re.compile(r"STG\.E(\.\w+)*\.128"),
    "mma": re.compile(r"HMMA\.16816\.F32|IMMA\.16832\.S8"),
    "ldmatrix": re.compile(r"LDSM\.16\.M"),
}


@dataclass
class Kernel:
    """What the compiler reports of a kernel, and how often each instruction occurs in it."""

    registers: int = 0
    stack: int = 0  # bytes of local memory
    spills: int = 0  # bytes stored and loaded
    static_shared: int = 0
    instructions: dict[str, int] = field(default_factory=dict)


def missing_tool() -> str | None:
    """What this machine lacks, or None."""
    for name, found in (("nvcc", nvcc()), ("cuobjdump", cuobjdump())):
        if found is None:
            return name
    return None if shutil.which("c++filt") else "c++filt"


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def cuobjdump() -> str | None:
    """On PATH, or where the wheel puts it."""
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return next(map(str, wheels.glob("*/bin/cuobjdump")), None) or shutil.which("cuobjdump")


def run(*command: str) -> str:
    """The command's standard output and errors; exits with both when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def parse_report(text: str) -> dict[str, Kernel]:
    """Kernels by mangled name, from what `ptxas -v` prints."""
    kernels: dict[str, Kernel] = {}
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernels[match[1]] = kernel = Kernel()
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", line):
            kernel.stack, kernel.spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.static_shared = int(shared[1]) if shared else 0
    return kernels


def parse_disassembly(text: str) -> dict[str, dict[str, int]]:
    """Instruction counts by mangled kernel name, from `cuobjdump -sass`."""
    found: dict[str, dict[str, int]] = {}
    instruction = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)")
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts = found.setdefault(match[1], {})
        elif match := instruction.match(line):
            counts[match[1]] = counts.get(match[1], 0) + 1
    return found


def short_name(demangled: str) -> str:
    """`gemm_kernel<Int4Weight<false>, 16>`: no namespaces, return type or parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\bqn::(cuda::)?", "", demangled)
    name = name.removeprefix("void ").replace("> >", ">>")
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def sources_digest(source: Path, arch: str) -> str:
    """Names everything that the compilation of `source` depends on."""
    digest = hashlib.sha256(run(str(nvcc()), "--version").encode())
    digest.update(" ".join([*FLAGS, arch, source.name]).encode())
    headers = [*CSRC.glob("core/*.h"), *CSRC.glob("kernels/*.h"), *CSRC.glob("kernels/cuda/*.*h")]
    for file in [source, *sorted(headers), Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def compile_kernels(source: Path, arch: str) -> dict[str, Kernel]:
    """Kernels of a source by short name."""
    kept = BUILD / f"{source.stem}.{arch}.{sources_digest(source, arch)}.json"
    if kept.is_file():
        return {name: Kernel(**values) for name, values in json.loads(kept.read_text()).items()}
    BUILD.mkdir(parents=True, exist_ok=True)
    for old in BUILD.glob(f"{source.stem}.{arch}.*"):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        report = run(str(nvcc()), *FLAGS, f"-arch={arch}", "-cubin", str(source), "-o", cubin)
        kernels = parse_report(report)
        for mangled, counts in parse_disassembly(run(str(cuobjdump()), "-sass", cubin)).items():
            kernels[mangled].instructions = counts
    demangled = run("c++filt", *kernels).splitlines() if kernels else []
    named = dict(zip(map(short_name, demangled), kernels.values(), strict=True))
    kept.write_text(json.dumps({name: vars(kernel) for name, kernel in named.items()}))
    return named


def resident_blocks(kernel: Kernel, threads: int, shared: int, arch: str) -> int:
    """Blocks that fit on a multiprocessor."""
    per_warp = -(-kernel.registers * 32 // 256) * 256  # allocated in units of 256
    by_registers = REGISTERS // (per_warp * (threads // 32))
    by_shared = SHARED[arch] // (shared + RESERVED_SHARED)
    return min(by_registers, by_shared, THREADS // threads, 32)


def wrong(kernel: Kernel, figures: dict[str, object], arch: str) -> list[str]:
    """What a kernel has against its figures."""
    found = []
    threads, shared = figures["threads"], figures["shared"]
    registers, blocks = figures["registers"], figures["blocks"]
    assert isinstance(threads, int) and isinstance(shared, int)
    assert isinstance(registers, int) and isinstance(blocks, int)
    if kernel.spills:
        found.append(f"spills {kernel.spills} bytes, expected none")
    if kernel.stack:
        found.append(f"has {kernel.stack} bytes of stack in local memory, expected none")
    if kernel.registers > registers:
        found.append(f"uses {kernel.registers} registers, at most {registers} allowed")
    if kernel.static_shared:
        found.append(f"has {kernel.static_shared} bytes of static shared memory, expected none")
    resident = resident_blocks(kernel, threads, shared, arch)
    if resident < blocks:
        found.append(f"{resident} blocks fit on a multiprocessor, expected at least {blocks}")
    local = {name: n for name, n in kernel.instructions.items() if re.match(r"(LDL|STL)\b", name)}
    if local:
        found.append(f"accesses local memory: {local}")
    needs = figures["needs"]
    assert isinstance(needs, list)
    for need in needs:
        if not any(INSTRUCTIONS[need].match(name) for name in kernel.instructions):
            found.append(f"has no {need} ({INSTRUCTIONS[need].pattern})")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--figures", type=Path, default=FIGURES, metavar="FILE")
    parser.add_argument("--list", action="store_true", help="print what was found")
    parser.add_argument("sources", type=Path, nargs="*", metavar="SOURCE.cu")
    options = parser.parse_args()
    if tool := missing_tool():
        sys.exit(f"cuda_gate: {tool} is missing")
    figures: dict[str, dict[str, object]] = json.loads(options.figures.read_text())["kernels"]
    sources = options.sources or sorted((CSRC / "kernels/cuda").glob("*.cu"))
    jobs = [(source, arch) for source in sources for arch in SHARED]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_kernels(*job), jobs))
    problems, seen = [], set()
    for (source, arch), kernels in zip(jobs, results, strict=True):
        for name, kernel in sorted(kernels.items()):
            seen.add(name)
            if options.list:
                facts = {need: 0 for need in INSTRUCTIONS}
                for instruction, count in kernel.instructions.items():
                    for need, pattern in INSTRUCTIONS.items():
                        facts[need] += count if pattern.match(instruction) else 0
                print(f"{source.name} {arch} {name}: {kernel.registers} registers, {facts}")
            if name not in figures:
                problems.append(f"{source.name}: {name} has no figures in {options.figures.name}")
                continue
            problems += [
                f"{source.name} {arch}: {name} {w}" for w in wrong(kernel, figures[name], arch)
            ]
    if not options.sources:
        problems += [
            f"{options.figures.name}: there is no kernel {n}" for n in figures if n not in seen
        ]
    print("\n".join(dict.fromkeys(problems)) or f"cuda gate: {len(seen)} kernels are as declared")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
