"""csrc/kernels/cuda/swiglu.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Simulator, dtype_value, struct
from tolerance import assert_pointwise

SHAPES = [(0, 8), (1, 1), (1, 8), (3, 17), (2, 100), (1, 2048), (5, 1032), (2, 4864)]
DTYPES = [torch.float32, torch.bfloat16]


def swiglu(sim: Simulator, gate: torch.Tensor, up: torch.Tensor, padding: int = 0) -> torch.Tensor:
    tokens, inter = gate.shape
    stride = inter + padding
    gate_buffer, up_buffer = (
        sim.upload(torch.nn.functional.pad(tensor, (0, padding))) for tensor in (gate, up)
    )
    out = sim.empty((tokens, stride), gate.dtype)
    args = struct("SwigluArgs")(
        out=out.pointer,
        gate=gate_buffer.pointer,
        up=up_buffer.pointer,
        inter=inter,
        out_stride=stride,
        gate_stride=stride,
        up_stride=stride,
        dtype=dtype_value(gate.dtype),
    )
    assert sim.call("qn_cuda_swiglu", args, tokens) == 0
    if padding:
        assert torch.isnan(out.tensor()[:, inter:]).all(), "wrote beyond a row"
    return out.tensor()[:, :inter]


def check(out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> None:
    silu = torch.nn.functional.silu
    assert_pointwise(out, silu(gate.double()) * up.double(), silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_matches_reference(sim, rng, shape, dtype, scale):
    gate, up = ((torch.randn(shape, generator=rng) * scale).to(dtype) for _ in range(2))
    check(swiglu(sim, gate, up), gate, up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [3, 8])
def test_rows_may_be_strided(sim, rng, dtype, padding):
    gate, up = (torch.randn((3, 72), generator=rng).to(dtype) for _ in range(2))
    check(swiglu(sim, gate, up, padding), gate, up)


def test_extreme_gates(sim):
    gate = torch.tensor([[-torch.inf, -1e30, -200.0, -80.0, 0.0, 80.0, 1e30, torch.inf]])
    out = swiglu(sim, gate, torch.ones_like(gate))
    assert torch.equal(out[0, 5:], gate[0, 5:]) and torch.equal(out[0, 1:3].abs(), torch.zeros(2))
    assert out[0, 4] == 0 and torch.isnan(out[0, 0])  # inf * 0, as in torch
    check(out[:, 3:4], gate[:, 3:4], torch.ones((1, 1)))
    assert torch.isnan(swiglu(sim, torch.full((1, 4), torch.nan), torch.ones((1, 4)))).all()


def test_out_may_be_gate(sim, rng):
    gate, up = (torch.randn((2, 640), generator=rng).bfloat16() for _ in range(2))
    gate_buffer, up_buffer = sim.upload(gate), sim.upload(up)
    args = struct("SwigluArgs")(
        out=gate_buffer.pointer,
        gate=gate_buffer.pointer,
        up=up_buffer.pointer,
        inter=640,
        out_stride=640,
        gate_stride=640,
        up_stride=640,
        dtype=dtype_value(torch.bfloat16),
    )
    assert sim.call("qn_cuda_swiglu", args, 2) == 0
    check(gate_buffer.tensor(), gate, up)


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_threads_does_not_matter(sim, rng, seed):
    gate, up = (torch.randn((2, 3000), generator=rng).bfloat16() for _ in range(2))
    in_order = swiglu(sim, gate, up)
    sim.configure(seed=seed)
    assert torch.equal(swiglu(sim, gate, up), in_order)


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_the_minimum(sim, rng, dtype):
    gate, up = (torch.randn((4, 4864), generator=rng).to(dtype) for _ in range(2))
    swiglu(sim, gate, up)
    counted, operand = sim.counters(), 4 * 4864 * dtype.itemsize
    assert 32 * counted.load_sectors == counted.load_bytes == 2 * operand
    assert 32 * counted.store_sectors == counted.store_bytes == operand


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inter", [37, 48])
def test_ptx_agrees(sim, rng, dtype, inter):
    sim.compare_with_ptx(CUDA / "swiglu.cu")
    gate, up = (torch.randn((3, inter), generator=rng).to(dtype) for _ in range(2))
    swiglu(sim, gate, up)
