"""csrc/kernels/cuda/quantize_tokens.cu against its definition."""

from __future__ import annotations

import pytest
import torch
from cuda_simulator import CUDA, Simulator, struct


def quantize_tokens(
    sim: Simulator, x: torch.Tensor, padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales)."""
    tokens, cols = x.shape
    codes = sim.upload(torch.full((tokens, cols + padding), 99, dtype=torch.int8))
    scales = sim.empty((tokens,), torch.float32)
    args = struct("QuantizeTokensArgs")(
        codes=codes.pointer,
        scales=scales.pointer,
        x=sim.upload(torch.nn.functional.pad(x, (0, padding))).pointer,
        tokens=tokens,
        cols=cols,
        codes_stride=cols + padding,
        x_stride=cols + padding,
    )
    assert sim.call("qn_cuda_quantize_tokens", args) == 0
    assert (codes.tensor()[:, cols:] == 99).all(), "wrote beyond a row"
    return codes.tensor()[:, :cols], scales.tensor()


@pytest.mark.parametrize("shape", [(0, 16), (1, 16), (3, 144), (2, 2048), (2, 4864)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("padding", [0, 16])
def test_codes_and_scales(sim, rng, shape, size, padding):
    x = (torch.randn(shape, generator=rng) * size).bfloat16()
    codes, scales = quantize_tokens(sim, x, padding)
    if shape[0] == 0:
        return
    largest = x.double().abs().amax(1)
    assert torch.equal(scales, (largest.float() / 127))
    exact = x.double() / (largest[:, None] / 127)
    # Nearest, where float32 tells what is nearest.
    assert ((codes.double() - exact).abs() <= 0.5 + 1e-4).all()
    assert (codes.double().abs().amax(1) == 127).all()


def test_a_token_of_zeros(sim):
    codes, scales = quantize_tokens(sim, torch.zeros((2, 32), dtype=torch.bfloat16))
    assert not codes.any() and not scales.any()


def test_traffic_is_the_minimum(sim, rng):
    tokens, cols = 4, 4096
    quantize_tokens(sim, torch.randn((tokens, cols), generator=rng).bfloat16())
    counted = sim.counters()
    assert 32 * counted.distinct_load_sectors == tokens * cols * 2
    assert counted.load_sectors == counted.load_sectors_needed
    assert 32 * counted.store_sectors <= tokens * cols + tokens * 32


def test_ptx_agrees(sim, rng):
    sim.compare_with_ptx(CUDA / "quantize_tokens.cu")
    quantize_tokens(sim, torch.randn((2, 80), generator=rng).bfloat16())
