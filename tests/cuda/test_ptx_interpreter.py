"""The device's half of ptx.cuh, as nvcc compiles it, agrees with the executor bit for bit; damaged
wrappers are noticed.

tests/ptx_interpreter.py executes the PTX. The kernels' own tests compare one or two small shapes of
each kernel (`Simulator.compare_with_ptx`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ptx_interpreter
import pytest
import torch
from cuda_simulator import CASES, CUDA, ROOT, Buffer, Simulator
from ptx_interpreter import PtxError

WRAPPERS = CASES / "wrappers.cu"
Run = Callable[[Simulator], object]


@pytest.fixture(scope="module")
def random() -> np.random.Generator:
    return np.random.default_rng(4)


def words(sim: Simulator, shape: tuple[int, ...], seed: int = 5) -> Buffer:
    """A buffer of random bits."""
    values = np.random.default_rng(seed).integers(0, 1 << 32, shape).astype(np.uint32)
    return sim.upload(torch.from_numpy(values.view(np.int32)))


def floats(sim: Simulator, shape: tuple[int, ...], seed: int = 6) -> Buffer:
    """A buffer of floats of very different sizes, zeros and infinities among them."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape) * np.exp2(generator.integers(-20, 21, shape))
    values.flat[:5] = [0.0, -0.0, np.inf, -np.inf, 1e-40]
    return sim.upload(torch.from_numpy(values.astype(np.float32)))


def halves(sim: Simulator, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 7) -> Buffer:
    """Pairs of 16-bit floats as words: shape counts words."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((*shape, 2), generator=generator).to(dtype)
    return sim.upload(values.view(torch.int32).squeeze(-1))


def run_mma(kind: str, dtype: torch.dtype) -> Run:
    def run(sim: Simulator) -> object:
        d = floats(sim, (32, 4), seed=8)
        d.upload(torch.randn((32, 4), generator=torch.Generator().manual_seed(9)))
        a, b = halves(sim, (32, 4), dtype), halves(sim, (32, 2), dtype, seed=10)
        return sim.call(f"wrapped_mma_{kind}", d, a, b)

    return run


def run_mma_s8(sim: Simulator) -> object:
    d, a, b = words(sim, (32, 4)), words(sim, (32, 4), 1), words(sim, (32, 2), 2)
    return sim.call("wrapped_mma_s8", d, a, b)


def run_ldmatrix(sim: Simulator) -> object:
    return sim.call("wrapped_ldmatrix", sim.empty((32, 14), torch.int32), words(sim, (32, 4)))


def run_arithmetic(sim: Simulator) -> object:
    n = 256
    operands = [halves(sim, (n,), torch.float16, seed) for seed in (1, 2, 3)]
    out = sim.empty((n, 17), torch.int32)
    return sim.call("wrapped_arithmetic", out, floats(sim, (n,)), floats(sim, (n,)), *operands, n)


def run_integer_arithmetic(sim: Simulator) -> object:
    n = 64
    operands = [words(sim, (n,), seed) for seed in (1, 2, 3)]
    # Patterns that are NaNs of both 16-bit formats would only test which NaN comes out.
    for operand in operands:
        operand.upload(operand.tensor() & ~0x40004000)
    out = sim.empty((n, 17), torch.int32)
    return sim.call("wrapped_arithmetic", out, floats(sim, (n,)), floats(sim, (n,)), *operands, n)


def run_exchange(sim: Simulator) -> object:
    return sim.call("wrapped_exchange", sim.empty((32, 16), torch.int32), words(sim, (32,)))


def run_copy(sim: Simulator) -> object:
    return sim.call("wrapped_copy", sim.empty((448,), torch.int32), words(sim, (256,)))


def run_atomic(sim: Simulator) -> object:
    out, total = words(sim, (136,), 3), sim.upload(torch.zeros(1))
    return sim.call("wrapped_atomic", out, total, words(sim, (128,)))


def run_roles(sim: Simulator) -> object:
    return sim.call("wrapped_roles", sim.empty((12, 128), torch.int32))


RUNS: dict[str, Run] = {
    "mma_bf16": run_mma("bf16", torch.bfloat16),
    "mma_f16": run_mma("f16", torch.float16),
    "mma_s8": run_mma_s8,
    "ldmatrix": run_ldmatrix,
    "arithmetic": run_arithmetic,
    "integer_arithmetic": run_integer_arithmetic,
    "exchange": run_exchange,
    "copy": run_copy,
    "atomic": run_atomic,
    "roles": run_roles,
}


@pytest.mark.parametrize("name", RUNS)
def test_wrappers_agree(cases: Simulator, name: str):
    cases.compare_with_ptx(WRAPPERS)
    assert RUNS[name](cases) == 0


@pytest.mark.parametrize("name", RUNS)
def test_unchecked_build_agrees(cases: Simulator, fast_cases: Simulator, name: str):
    contents = []
    for simulator in (cases, fast_cases):
        assert RUNS[name](simulator) == 0
        contents.append([buffer.tensor() for buffer in simulator.buffers])
    for checked, fast in zip(*contents, strict=True):
        assert torch.equal(checked.view(torch.int32), fast.view(torch.int32))


# Damage to the device's half of ptx.cuh, by the run that must notice. Every round is compiled once.
ROUNDS: list[dict[str, tuple[str, str]]] = [
    {
        "mma_bf16": ('"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)'),
        "ldmatrix": (".x4.trans.shared", ".x4.shared"),
        "arithmetic": ("0xEA;", "0xE8;"),
        "integer_arithmetic": ("prmt.b32 %0, %1, %2, %3", "prmt.b32 %0, %2, %1, %3"),
        "copy": ('"r"(ok ? 16 : 0)', '"r"(16)'),
        "roles": ('"bar.sync %0, %1;"', '"bar.sync 0, %1;"'),
    },
    {
        "mma_f16": ('"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])'),
        "ldmatrix": ('"=r"(r[0]), "=r"(r[1])', '"=r"(r[1]), "=r"(r[0])'),
        "arithmetic": ('"f"(hi), "f"(lo)', '"f"(lo), "f"(hi)'),
        "integer_arithmetic": ("dp4a.s32.s32", "dp4a.s32.u32"),
        "copy": ('"=r"(v.x), "=r"(v.y)', '"=r"(v.y), "=r"(v.x)'),
        "roles": ('"r"(id), "r"(threads)', '"r"(id), "r"(32)'),
    },
    {
        "mma_s8": ('"r"(a[2]), "r"(a[3])', '"r"(a[3]), "r"(a[2])'),
        "arithmetic": ("fma.rn.f16x2", "fma.rn.bf16x2"),
        "copy": ("[%0], [%1], 8, %2", "[%0], [%1], 4, %2"),
    },
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """For each round an include folder with the damaged ptx.cuh."""
    header = (CUDA / "ptx.cuh").read_text()
    device_half, host_half = header.split("\n#else\n")
    folders = []
    for damage in ROUNDS:
        include = tmp_path_factory.mktemp("damaged")
        shutil.copytree(ROOT / "csrc/core", include / "core")
        shutil.copytree(ROOT / "csrc/kernels", include / "kernels")
        changed = device_half
        for piece, replacement in damage.values():
            assert piece in changed, f"ptx.cuh has no {piece}"
            changed = changed.replace(piece, replacement)
        (include / "kernels/cuda/ptx.cuh").write_text(f"{changed}\n#else\n{host_half}")
        folders.append(include)
    return folders


@pytest.mark.parametrize(
    ("number", "name"), [(i, name) for i, damage in enumerate(ROUNDS) for name in damage]
)
def test_damaged_wrappers_are_noticed(
    cases: Simulator, damaged: list[Path], number: int, name: str
):
    cases.compare_with_ptx(WRAPPERS, include=damaged[number])
    with pytest.raises((AssertionError, PtxError), match=r"disagree|deadlock|cp\.async of a part"):
        RUNS[name](cases)


# ---- the interpreter itself

KERNEL = """
.visible .entry kernel(
    .param .u64 kernel_param_0
)
{{
    .reg .pred %p<3>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd1, %rd1, %rd2;
    {body}
    st.global.u32 [%rd1], %r2;
    ret;
}}
"""


def execute(body: str, threads: int = 32) -> list[int]:
    """What a kernel with this body leaves in %r2."""
    (entry,) = ptx_interpreter.parse(KERNEL.format(body=body)).values()
    memory = ptx_interpreter.Memory({4096: bytes(4 * threads)})
    pointer = (4096).to_bytes(8, "little")
    ptx_interpreter.run(entry, (1, 1, 1), (threads, 1, 1), 64, [pointer], memory)
    return np.frombuffer(memory.contents()[4096], np.uint32).tolist()


def test_threads_that_diverge_meet_again():
    body = """
    setp.lt.u32 %p1, %r1, 7;
    mov.u32 %r2, 0;
    @%p1 bra LOW;
    add.s32 %r2, %r2, 100;
    bra.uni JOIN;
LOW:
    add.s32 %r2, %r2, 1;
    add.s32 %r1, %r1, 1;
    setp.lt.u32 %p1, %r1, 7;
    @%p1 bra LOW;
JOIN:
    mov.u32 %r3, -1;
    vote.sync.ballot.b32 %r4, %p1, %r3;
    add.s32 %r2, %r2, %r4;
"""
    assert execute(body) == [7, 6, 5, 4, 3, 2, 1, *[100] * 25]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sin.approx.f32 %r2, %r1;", "unknown instruction: sin.approx.f32"),
        ("add.sat.s32 %r2, %r1, %r1;", "unknown instruction: add.sat.s32"),
        ("mov.u32 %r2, %clock;", "unknown operand: %clock"),
        (".local .b8 depot[16];", "unknown directive: .local"),
        ("ld.global.u32 %r2, [%rd1+4];", "in no buffer"),
        ("ld.global.u32 %r2, [%rd1+2];", "misaligned by 4"),
        ("st.shared.v4.u32 [%r1+64], {%r1, %r1, %r1, %r1};", "shared offset|misaligned"),
        ("setp.eq.u32 %p1, %r1, 3; @%p1 ret; mov.u32 %r3, -1; bar.warp.sync %r3;", "deadlock"),
        ("setp.eq.u32 %p1, %r1, 3; @%p1 ret; bar.sync 0;", "deadlock"),
    ],
)
def test_what_cannot_be_executed_is_an_error(body: str, message: str):
    with pytest.raises(PtxError, match=message):
        execute(body)


def test_division_truncates():
    body = """
    sub.s32 %r3, %r1, 16;
    mov.u32 %r4, 5;
    div.s32 %r2, %r3, %r4;
    rem.s32 %r5, %r3, %r4;
    mad.lo.s32 %r2, %r2, 1000, %r5;
"""
    expected = [1000 * int((t - 16) / 5) + (t - 16 - 5 * int((t - 16) / 5)) for t in range(32)]
    assert np.array(execute(body), np.uint32).view(np.int32).tolist() == expected
