"""csrc/kernels/cuda/swiglu_bwd.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Buffer, Simulator, dtype_value, struct
from gradients import assert_gradients

from qwen_native import reference

SHAPES = [(0, 8), (1, 1), (1, 8), (7, 117), (2, 100), (5, 1032), (2, 4864)]
DTYPES = [torch.float32, torch.bfloat16]


def call(sim: Simulator, inputs: list[Buffer], dgate: Buffer, dup: Buffer, inter: int) -> None:
    tokens, stride = dgate.shape
    names = ("dgate", "dup", "dout", "gate", "up")
    buffers = dict(zip(names, (dgate, dup, *inputs), strict=True))
    args = struct("SwigluBwdArgs")(
        **{name: buffer.pointer for name, buffer in buffers.items()},
        **{f"{name}_stride": stride for name in names},
        inter=inter,
        dtype=dtype_value(dgate.dtype),
    )
    assert sim.call("qn_cuda_swiglu_bwd", args, tokens) == 0


def swiglu_bwd(
    sim: Simulator, *inputs: torch.Tensor, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) of dout, gate, up."""
    tokens, inter = inputs[0].shape
    buffers = [sim.upload(torch.nn.functional.pad(x, (0, padding))) for x in inputs]
    dgate, dup = (sim.empty((tokens, inter + padding), inputs[0].dtype) for _ in range(2))
    call(sim, buffers, dgate, dup, inter)
    for out in (dgate, dup):
        assert not padding or torch.isnan(out.tensor()[:, inter:]).all(), "wrote beyond a row"
    return dgate.tensor()[:, :inter], dup.tensor()[:, :inter]


def random(rng: torch.Generator, shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=rng).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_matches_autograd(sim, rng, shape, dtype, scale):
    dout, gate, up = random(rng, shape, dtype)
    gate = gate * scale
    assert_gradients(swiglu_bwd(sim, dout, gate, up), reference.swiglu, (gate, up), dout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [3, 8])
def test_rows_may_be_strided(sim, rng, dtype, padding):
    dout, gate, up = random(rng, (3, 72), dtype)
    grads = swiglu_bwd(sim, dout, gate, up, padding=padding)
    assert_gradients(grads, reference.swiglu, (gate, up), dout)


def test_extreme_gates(sim):
    gate = torch.tensor([[-1e30, -200.0, -80.0, 0.0, 80.0, 1e30]])
    ones = torch.ones_like(gate)
    dgate, dup = swiglu_bwd(sim, ones, gate, ones)
    assert torch.equal(dgate[0, 3:], torch.tensor([0.5, 1.0, 1.0]))
    assert torch.equal(dup[0, 3:], gate[0, 3:])
    assert dgate[0, :2].abs().max() == 0 and dup[0, :2].abs().max() == 0
    finite = [x[:, 2:5] for x in (dgate, dup, gate, ones)]
    assert_gradients(finite[:2], reference.swiglu, finite[2:], finite[3])


@pytest.mark.parametrize("places", [(0, 1), (1, 2), (2, 0)])
def test_gradients_may_lie_where_the_inputs_are(sim, rng, places):
    inputs = random(rng, (2, 644), torch.bfloat16)
    expected = swiglu_bwd(sim, *inputs)
    buffers = [sim.upload(x) for x in inputs]
    call(sim, buffers, buffers[places[0]], buffers[places[1]], 644)
    assert all(torch.equal(buffers[p].tensor(), e) for p, e in zip(places, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_the_minimum(sim, rng, dtype):
    swiglu_bwd(sim, *random(rng, (4, 4864), dtype))
    counted, operand = sim.counters(), 4 * 4864 * dtype.itemsize
    assert 32 * counted.load_sectors == counted.load_bytes == 3 * operand
    assert 32 * counted.store_sectors == counted.store_bytes == 2 * operand


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inter", [37, 48])
def test_ptx_agrees(sim, rng, dtype, inter):
    sim.compare_with_ptx(CUDA / "swiglu_bwd.cu")
    swiglu_bwd(sim, *random(rng, (3, inter), dtype))
