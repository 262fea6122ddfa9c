"""Inputs, calls and references of the CUDA GEMMs' tests; packs weights as gemm_layout.h says."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from cuda_simulator import CUDA, Buffer, Simulator, dtype_value, struct
from tolerance import assert_contraction

TILE = 64


def _padded(n: int) -> int:
    return -(-n // TILE) * TILE


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, cols] codes to the packed tiles, as int32 words."""
    rows, cols = codes.shape
    padded = torch.zeros(_padded(rows), _padded(cols), dtype=torch.int64)
    padded[:rows, :cols] = codes
    # Row 64 a + 8 n + g, column 64 b + 16 s + 8 j + 2 t + e; lane 4 g + t.
    split = padded.view(_padded(rows) // TILE, 8, 8, _padded(cols) // TILE, 4, 2, 4, 2)
    lanes = split.permute(0, 3, 1, 2, 6, 4, 5, 7)  # a, b, n, g, t, s, j, e
    if bits == 8:
        flat = lanes.reshape(*lanes.shape[:6], 4)
        words = sum(flat[..., i] << (8 * i) for i in range(4))
    else:
        pairs = lanes.reshape(*lanes.shape[:5], 2, 2, 2, 2)  # .., word, s % 2, j, e
        words = sum(
            pairs[..., s, j, e] << (4 * (2 * s + j + 4 * e))
            for s in range(2)
            for j in range(2)
            for e in range(2)
        )
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).flatten()


@dataclass
class PackedWeight:
    """A quantised weight, on the simulated device and as float64."""

    value: torch.Tensor  # [rows, cols]
    codes: Buffer
    scales: Buffer
    zeros: Buffer | None

    @property
    def bytes(self) -> int:
        return self.codes.bytes + self.scales.bytes + (self.zeros.bytes if self.zeros else 0)


def random_weight(
    sim: Simulator,
    rng: torch.Generator,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    zeros: bool = False,
) -> PackedWeight:
    rows, cols = shape
    groups = -(-cols // group_size)
    codes = torch.randint(0, 2**bits, shape, generator=rng)
    scales = (torch.rand((groups, rows), generator=rng) * 0.1 + 0.01).half()
    zero = torch.full((groups, rows), 2 ** (bits - 1), dtype=torch.uint8)
    if zeros:
        zero = torch.randint(0, 2**bits, (groups, rows), generator=rng).to(torch.uint8)
    group = torch.arange(cols) // group_size
    value = (codes - zero.T[:, group].long()).double() * scales.T[:, group].double()

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, _padded(rows) - rows))

    return PackedWeight(
        value,
        sim.upload(pack_codes(codes, bits)),
        sim.upload(padded(scales)),
        sim.upload(padded(zero)) if zeros else None,
    )


@dataclass
class Gemm:
    """One call of a GEMM launcher and what it should give."""

    out: torch.Tensor
    reference: torch.Tensor  # float64
    plain: torch.Tensor  # torch, in bf16 with float32 sums
    minimum_bytes: int  # of every operand once
    blocks: int
    split: bool

    def check(self) -> None:
        assert_contraction(self.out, self.reference, self.plain)


def call_gemm(sim: Simulator, name: str, args: Any, multiprocessors: int) -> Any:
    """Runs qn_cuda_gemm_<name> with the scratch memory that its plan needs; returns the plan."""
    device, plan = struct("DeviceInfo")(multiprocessors=multiprocessors), struct("GemmPlan")()
    sim.library.qn_cuda_gemm_plan(ctypes.byref(args), ctypes.byref(device), ctypes.byref(plan))
    sim.library.qn_cuda_gemm_workspace.restype = ctypes.c_int64
    workspace_bytes = sim.library.qn_cuda_gemm_workspace(ctypes.byref(plan))
    assert (workspace_bytes > 0) == plan.split
    if plan.split:
        args.workspace = sim.empty((workspace_bytes // 4,), torch.float32).pointer
    assert sim.call(f"qn_cuda_gemm_{name}", args, device) == 0
    return plan


def run_gemm(
    sim: Simulator,
    rng: torch.Generator,
    weight: torch.Tensor | PackedWeight,
    tokens: int,
    *,
    group_size: int = 32,
    bias: bool = False,
    residual: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    multiprocessors: int = 4,
    invariant: bool = False,
    x: torch.Tensor | None = None,
    padding: int = 0,
) -> Gemm:
    """`weight`: bf16 for gemm_bf16, else packed. Rows of x and out lie `padding` apart."""
    dense = isinstance(weight, torch.Tensor)
    value = weight.double() if isinstance(weight, torch.Tensor) else weight.value
    rows, cols = value.shape
    if x is None:
        x = torch.randn((tokens, cols), generator=rng).bfloat16()
    bias_values = torch.randn(rows, generator=rng).bfloat16() if bias else None
    residual_values = torch.randn((tokens, rows), generator=rng).bfloat16() if residual else None

    def uploaded(tensor: torch.Tensor | None) -> Buffer | None:
        return None if tensor is None else sim.upload(tensor)

    def pointer(buffer: Buffer | None) -> int | None:
        return None if buffer is None else buffer.pointer

    x_buffer = sim.upload(torch.nn.functional.pad(x, (0, padding)))
    codes = sim.upload(weight) if isinstance(weight, torch.Tensor) else weight.codes
    bias_buffer, residual_buffer = uploaded(bias_values), uploaded(residual_values)
    out = sim.empty((tokens, rows + padding), out_dtype)
    args = struct("GemmArgs")(
        out=out.pointer,
        x=x_buffer.pointer,
        weight=codes.pointer,
        scales=None if isinstance(weight, torch.Tensor) else weight.scales.pointer,
        zeros=None if isinstance(weight, torch.Tensor) else pointer(weight.zeros),
        bias=pointer(bias_buffer),
        residual=pointer(residual_buffer),
        tokens=tokens,
        rows=rows,
        cols=cols,
        out_stride=rows + padding,
        x_stride=cols + padding,
        weight_stride=cols,
        residual_stride=rows if residual else 0,
        group_size=group_size,
        out_dtype=dtype_value(out_dtype),
        invariant=invariant,
    )
    bits = 16 if dense else 8 * codes.bytes // (_padded(rows) * _padded(cols))
    plan = call_gemm(sim, {16: "bf16", 8: "int8", 4: "int4"}[bits], args, multiprocessors)

    reference = x.double() @ value.T
    plain = x.float() @ value.bfloat16().float().T
    for extra in (bias_values, residual_values):
        if extra is not None:
            reference = reference + extra.double()
            plain = plain + extra.float()
    minimum = tokens * cols * 2 + tokens * rows * out_dtype.itemsize
    minimum += codes.bytes if isinstance(weight, torch.Tensor) else weight.bytes
    minimum += sum(buffer.bytes for buffer in (bias_buffer, residual_buffer) if buffer)
    result = out.tensor()
    if padding:
        assert torch.isnan(result[:, rows:]).all(), "wrote beyond a row"
    return Gemm(
        result[:, :rows], reference, plain.to(out_dtype), minimum, plan.blocks, bool(plan.split)
    )


def assert_no_bank_conflicts(sim: Simulator, *apart_from: str, ldmatrix: bool = True) -> None:
    """`apart_from`: pieces of source lines, outside of any inner loop, that may have some.

    `ldmatrix`: whether the kernel has these instructions.
    """
    counted = sim.counters()
    assert counted.mma > 0 and (counted.ldmatrix > 0) == ldmatrix
    assert counted.ldmatrix_wavefronts == 4 * counted.ldmatrix
    lines = [line for line in sim.line_traffic() if line.shared]
    assert lines
    for line in lines:
        if line.units != line.units_needed:
            assert any(piece in _source_of(line.where) for piece in apart_from), line


def _source_of(where: str) -> str:
    """The source lines that an instruction comes from, innermost first."""
    frames = (frame.split(":") for frame in where.split(" < "))
    return "\n".join((CUDA / file).read_text().splitlines()[int(n) - 1] for file, n in frames)
