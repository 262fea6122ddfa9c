"""The CUDA kernels as tests call them: compiled as host C++ and run by the SIMT executor.

docs/CUDA.md explains the executor. `Simulator` is a ctypes view of simt/c_api.cpp; the launchers of
csrc/kernels/cuda/*.cu are called by name, with the structs of the headers.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ptx_interpreter
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc/kernels/cuda"
BUILD = ROOT / "build/cuda_sim"
CASES = ROOT / "tests/cuda"


def missing_build_tool() -> str | None:
    """The first tool that building the simulator needs and this machine lacks."""
    return next(
        (t for t in ("cmake", "ninja", "g++", "addr2line", "nm", "c++filt") if not shutil.which(t)),
        None,
    )


@cache
def build(target: str) -> Path:
    """Builds a target of csrc/kernels/cuda/simt/CMakeLists.txt; returns its library."""
    cases = ";".join(str(path) for path in sorted(CASES.glob("*.cu")))
    options = [f"-DQN_SIMT_CASES={cases}", "-DCMAKE_CXX_COMPILER=g++"]
    if shutil.which("ccache"):
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    _run("cmake", "-S", str(CUDA / "simt"), "-B", str(BUILD), "-G", "Ninja", *options)
    _run("cmake", "--build", str(BUILD), "--target", target)
    return BUILD / f"lib{target}.so"


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


@dataclass(frozen=True)
class Report:
    """An error that the executor found in a kernel."""

    kind: str
    kernel: str
    block: tuple[int, ...]
    thread: int
    where: str  # "file:line", innermost first when functions were inlined
    occurrences: int
    message: str

    def __str__(self) -> str:
        return (
            f"{self.kind}: kernel {self.kernel}, block {self.block}, thread {self.thread}, "
            f"{self.where}: {self.message} [{self.occurrences}x]"
        )


@dataclass(frozen=True)
class LineTraffic:
    """What one load or store instruction of the source moved."""

    where: str
    shared: bool
    write: bool
    requests: int  # executions by a warp
    units: int  # sectors of 32 bytes (global) or wavefronts (shared)
    units_needed: int  # if the same bytes were packed
    bytes: int  # global only: distinct bytes, summed over requests


class Counters(ctypes.Structure):
    """Totals since the last reset; `Counters` of csrc/kernels/cuda/simt/machine.h."""

    launches: int
    blocks: int
    barriers: int
    switches: int
    mma: int
    ldmatrix: int
    ldmatrix_wavefronts: int
    shuffles: int
    atomics: int
    cp_async_bytes: int
    load_requests: int
    load_sectors: int
    load_sectors_needed: int
    load_bytes: int
    store_requests: int
    store_sectors: int
    store_sectors_needed: int
    store_bytes: int
    shared_requests: int
    shared_wavefronts: int
    shared_wavefronts_needed: int
    distinct_load_sectors: int
    distinct_store_sectors: int


Counters._fields_ = [(name, ctypes.c_uint64) for name in Counters.__annotations__]


@dataclass(frozen=True)
class Launch:
    """One recorded launch."""

    name: str
    kernel: str  # demangled
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: list[bytes]


class Ptx:
    """Kernels as nvcc compiles them, without contraction of products and sums."""

    def __init__(self, *sources: Path, include: Path = ROOT / "csrc") -> None:
        if nvcc() is None:
            pytest.skip("no PTX: nvcc is missing")
        self.entries: dict[str, ptx_interpreter.Entry] = {}
        for source in sources:
            parsed = _parsed_ptx(source, include)
            names = _run("c++filt", *parsed).splitlines()
            for name, entry in zip(names, parsed.values(), strict=True):
                # nvcc gives anonymous namespaces names of their own.
                self.entries[re.sub(r"_GLOBAL__N__\w+", "(anonymous namespace)", name)] = entry

    def entry(self, kernel: str) -> ptx_interpreter.Entry:
        assert kernel in self.entries, f"no entry {kernel} among {list(self.entries)}"
        return self.entries[kernel]


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@cache
def _parsed_ptx(source: Path, include: Path) -> dict[str, ptx_interpreter.Entry]:
    """Entries of a source file; compiled again when it or any header has changed."""
    compiler = nvcc()
    assert compiler is not None
    key = hashlib.sha256(str((source, include)).encode()).hexdigest()[:16]
    output = BUILD / "ptx" / f"{source.stem}-{key}.ptx"
    inputs = [source, *include.rglob("*.h"), *include.rglob("*.cuh")]
    newest = max(file.stat().st_mtime for file in inputs)
    if not output.is_file() or output.stat().st_mtime < newest:
        output.parent.mkdir(parents=True, exist_ok=True)
        options = ["-std=c++20", "-arch=sm_80", "-fmad=false", f"-I{include}"]
        _run(compiler, *options, "-ptx", str(source), "-o", f"{output}.new")
        os.replace(f"{output}.new", output)
    return ptx_interpreter.parse(output.read_text())


class Buffer:
    """Global memory of the simulated device, holding one tensor."""

    def __init__(self, simulator: Simulator, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.simulator, self.shape, self.dtype = simulator, tuple(shape), dtype
        self.bytes = dtype.itemsize * torch.Size(shape).numel()
        self.pointer: int = simulator.library.qn_simt_alloc(self.bytes)
        assert self.pointer, f"no memory for {self.bytes} bytes"

    def upload(self, tensor: torch.Tensor) -> None:
        """Replaces the content."""
        assert tensor.shape == self.shape and tensor.dtype == self.dtype
        data = tensor.contiguous()
        failed = self.simulator.library.qn_simt_upload(self.pointer, data.data_ptr(), self.bytes)
        assert not failed

    def tensor(self) -> torch.Tensor:
        """The content. What no kernel has written is NaN, or -1 in integers."""
        result = torch.empty(self.shape, dtype=self.dtype)
        library = self.simulator.library
        assert not library.qn_simt_download(result.data_ptr(), self.pointer, self.bytes)
        return result


class Simulator:
    """A library of kernels and the executor that runs them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ptx: Ptx | None = None
        self.stream: int | None = None  # the executor runs at once what is in none
        self.library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL)
        self.buffers: list[Buffer] = []
        size, pointer, text = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_char_p
        signatures: dict[str, tuple[type | None, list[type]]] = {
            "alloc": (pointer, [size]),
            "free": (ctypes.c_int, [pointer]),
            "upload": (ctypes.c_int, [pointer, pointer, size]),
            "download": (ctypes.c_int, [pointer, pointer, size]),
            "configure": (None, [ctypes.c_int, ctypes.c_int, ctypes.c_uint]),
            "reports": (text, []),
            "clear_reports": (None, []),
            "counters": (None, [pointer]),
            "line_counters": (text, []),
            "clear_counters": (None, []),
            "record_launches": (None, [ctypes.c_int]),
            "recorded_launches": (text, []),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.library, f"qn_simt_{name}")
            function.restype, function.argtypes = result, arguments

    def reset(self) -> None:
        """Frees all buffers, forgets reports and counters, returns to the default configuration."""
        for buffer in self.buffers:
            assert not self.library.qn_simt_free(buffer.pointer)
        self.buffers.clear()
        self.library.qn_simt_clear_reports()
        self.library.qn_simt_clear_counters()
        self.library.qn_simt_record_launches(0)
        self.ptx = None
        self.configure()

    def configure(self, check: bool = True, count: bool = True, seed: int = 0) -> None:
        """seed 0 runs blocks, warps and lanes in order, any other permutes them."""
        self.library.qn_simt_configure(check, count, seed)

    def upload(self, tensor: torch.Tensor) -> Buffer:
        """A new buffer with the tensor's values, dense."""
        buffer = self.empty(tensor.shape, tensor.dtype)
        buffer.upload(tensor)
        return buffer

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Buffer:
        """A new buffer that nobody has written to."""
        self.buffers.append(Buffer(self, shape, dtype))
        return self.buffers[-1]

    def call(self, launcher: str, *arguments: object) -> int:
        """Calls an extern "C" launcher with structs (by address), buffers and int64 numbers, then
        the default stream; returns its result, 0 when all is well."""
        converted: list[object] = []
        for argument in arguments:
            if isinstance(argument, ctypes.Structure):
                converted.append(ctypes.byref(argument))
            elif isinstance(argument, Buffer):
                converted.append(ctypes.c_void_p(argument.pointer))
            elif isinstance(argument, int):
                converted.append(ctypes.c_int64(argument))
            else:
                converted.append(argument)
        before = self._memory() if self.ptx else {}
        result: int = getattr(self.library, launcher)(*converted, ctypes.c_void_p(self.stream))
        if self.ptx:
            self._compare_with_ptx(before)
        return result

    def compare_with_ptx(self, *sources: Path, include: Path = ROOT / "csrc") -> None:
        """From now on every launch is repeated by the PTX interpreter, on what nvcc makes of the
        sources, and must leave the same bytes in memory. Skips the test when there is no nvcc."""
        self.ptx = Ptx(*sources, include=include)
        self.record_launches()

    def _memory(self) -> dict[int, bytes]:
        contents = {}
        for buffer in self.buffers:
            data = ctypes.create_string_buffer(max(buffer.bytes, 1))
            assert not self.library.qn_simt_download(data, buffer.pointer, buffer.bytes)
            contents[buffer.pointer] = data.raw[: buffer.bytes]
        return contents

    def _compare_with_ptx(self, before: dict[int, bytes]) -> None:
        assert self.ptx is not None
        launches = self.recorded_launches()
        self.record_launches()  # forgets these
        memory = ptx_interpreter.Memory(before)
        for launch in launches:
            entry = self.ptx.entry(launch.kernel)
            ptx_interpreter.run(
                entry, launch.grid, launch.block, launch.shared_bytes, launch.arguments, memory
            )
        names = ", ".join(launch.name for launch in launches)
        for pointer, expected in memory.contents().items():
            data = self._memory()[pointer]
            if data != expected:
                at = next(
                    i
                    for i, pair in enumerate(zip(data, expected, strict=True))
                    if pair[0] != pair[1]
                )
                differing = sum(a != b for a, b in zip(data, expected, strict=True))
                index = [buffer.pointer for buffer in self.buffers].index(pointer)
                raise AssertionError(
                    f"{names}: executor and PTX interpreter disagree in {differing} of {len(data)} "
                    f"bytes of buffer {index}, first at byte {at}"
                )

    def counters(self) -> Counters:
        result = Counters()
        self.library.qn_simt_counters(ctypes.byref(result))
        return result

    def take_reports(self) -> list[Report]:
        """Errors found since the last call, oldest first."""
        lines = self.library.qn_simt_reports().decode().splitlines()
        self.library.qn_simt_clear_reports()
        rows = [line.split("\t", 8) for line in lines]
        places = self._source_lines([row[6] for row in rows if row[6] != "0"])
        return [
            Report(
                kind=kind,
                kernel=kernel,
                block=tuple(map(int, block.split())),
                thread=int(thread),
                where=f"{Path(file).name}:{line}" if pc == "0" else places[pc],
                occurrences=int(occurrences),
                message=message,
            )
            for kind, kernel, block, thread, file, line, pc, occurrences, message in rows
        ]

    def line_traffic(self) -> list[LineTraffic]:
        """Traffic of every load and store instruction, by source line."""
        rows = [
            line.split("\t") for line in self.library.qn_simt_line_counters().decode().split("\n")
        ]
        rows = [row for row in rows if len(row) == 7]
        places = self._source_lines([row[0] for row in rows])
        traffic = [
            LineTraffic(places[pc], shared == "1", write == "1", *map(int, numbers))
            for pc, shared, write, *numbers in rows
        ]
        return sorted(traffic, key=lambda line: line.where)

    def record_launches(self, on: bool = True) -> None:
        self.library.qn_simt_record_launches(on)

    def recorded_launches(self) -> list[Launch]:
        """Launches since recording was switched on."""
        launches = []
        for line in self.library.qn_simt_recorded_launches().decode().splitlines():
            name, address, grid, block, shared, arguments = line.split("\t")
            x, y, z = map(int, grid.split())
            u, v, w = map(int, block.split())
            data = [bytes.fromhex(argument) for argument in arguments.split()]
            kernel = self._functions()[int(address, 16)]
            launches.append(Launch(name, kernel, (x, y, z), (u, v, w), int(shared), data))
        return launches

    @cache  # noqa: B019 - one object per library, for the whole session
    def _functions(self) -> dict[int, str]:
        """Demangled names of the library's functions by address."""
        symbols = _run("nm", "-C", "--defined-only", str(self.path)).splitlines()
        rows = (line.split(" ", 2) for line in symbols)
        return {int(row[0], 16): row[2] for row in rows if len(row) == 3 and row[1] in "tTwW"}

    def _source_lines(self, offsets: Sequence[str]) -> dict[str, str]:
        """ "file:line" of instructions; where functions were inlined the callers' lines follow."""
        if not offsets:
            return {}
        addresses = [f"0x{offset}" for offset in dict.fromkeys(offsets)]
        text = _run("addr2line", "-e", str(self.path), "-a", "-i", *addresses)
        places: dict[str, list[str]] = {}
        for line in text.splitlines():
            if line.startswith("0x"):
                frames = places.setdefault(f"{int(line, 16):x}", [])
            elif not line.startswith("??"):
                frames.append(Path(re.sub(r" \(discriminator \d+\)", "", line)).name)
        return {
            offset: " < ".join(f for f in frames if not f.startswith("ptx_host.h")) or "unknown"
            for offset, frames in places.items()
        }


# ---- structs of the C++ headers

_HEADERS = ("core/dtype.h", "kernels/quant_layout.h", "kernels/args.h", "kernels/cuda/kernels.h")
_SCALARS: dict[str, type] = {
    "bool": ctypes.c_bool,
    "char": ctypes.c_char,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
    "int": ctypes.c_int,
    **{
        f"{sign}int{bits}_t": getattr(ctypes, f"c_{sign}int{bits}")
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


@cache
def _headers() -> str:
    files = [ROOT / "csrc" / name for name in _HEADERS]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    return re.sub(r"//[^\n]*", "", text)


def _c_type(name: str) -> type:
    if name in _SCALARS:
        return _SCALARS[name]
    if enum := re.search(rf"enum class {name}\s*:\s*(\w+)", _headers()):
        return _SCALARS[enum[1]]
    return struct(name)


@cache
def struct(name: str) -> type[ctypes.Structure]:
    """The POD of that name in the kernels' headers, as ctypes sees it.

    Pointers take a Buffer's `.pointer`; enums take numbers (`enum_value`).
    """
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", _headers(), re.DOTALL)
    assert body is not None, f"no struct {name} in {', '.join(_HEADERS)}"
    fields: list[tuple[str, type]] = []
    for declaration in body[1].split(";"):
        words = declaration.replace("const ", " ").strip()
        if not words or "(" in words:
            continue
        kind, declarators = words.split(None, 1)
        for declarator in declarators.split(","):
            declared = declarator.split("=")[0].strip()
            pointer = "*" in declared or kind.endswith("*")
            array = re.fullmatch(r"(\w+)\[(\d+)\]", declared)
            if pointer:
                fields.append((declared.lstrip("* "), ctypes.c_void_p))
            elif array:
                fields.append((array[1], _c_type(kind) * int(array[2])))
            else:
                fields.append((declared, _c_type(kind)))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def enum_value(enum: str, name: str) -> int:
    """The number of an enumerator, e.g. enum_value("DType", "BF16")."""
    body = re.search(rf"enum class {enum}[^{{]*\{{([^}}]*)\}}", _headers())
    assert body is not None, f"no enum {enum} in {', '.join(_HEADERS)}"
    return [item.strip() for item in body[1].split(",")].index(name)


def dtype_value(dtype: torch.dtype) -> int:
    """qn::DType of a torch dtype."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32"}
    return enum_value("DType", names[dtype])
