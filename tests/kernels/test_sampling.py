"""csrc/kernels/cpu/sampling.cpp and csrc/ops/sampling.cpp: argmax and log_sum_exp."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qwen_native import _C, ops

INF, NAN = float("inf"), float("nan")
SIZES = [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 1000, 16383, 16384, 16385, 151936]


@pytest.mark.parametrize("n", SIZES)
def test_argmax_is_the_first_largest(isa, rng, n):
    x = torch.randn(n, generator=rng)
    assert ops.argmax(x) == int(np.argmax(x.numpy()))
    for first in {0, n // 3, n - 1}:
        x[first] = 50.0
        x[n - 1] = 50.0
        assert ops.argmax(x) == int(np.argmax(x.numpy()))


@pytest.mark.parametrize("n", [1, 16, 40, 300])
def test_argmax_special_values(isa, n):
    x = torch.full((n,), -INF)
    assert ops.argmax(x) == 0
    x[n // 2] = -1e38
    assert ops.argmax(x) == n // 2
    x[:] = NAN
    with pytest.raises(RuntimeError, match=r"\[argmax\] x has nothing but NaN"):
        ops.argmax(x)
    x[n - 1] = -INF
    assert ops.argmax(x) == n - 1
    x[n // 2] = INF
    assert ops.argmax(x) == n // 2


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 1e3, 1e37])
@pytest.mark.parametrize("shift", [0.0, 500.0, -500.0])
def test_log_sum_exp(isa, rng, n, scale, shift):
    x = torch.randn(n, generator=rng) * scale + shift
    ref = torch.logsumexp(x.double(), 0).item()
    # One rounding to float32, and a relative error of the sum, which is absolute in its logarithm:
    # exp is accurate to 2 ulp and at most seven additions of positive terms in float32 follow, in
    # all below 2^-22.
    limit = 0.5 * float(np.spacing(np.float32(abs(ref)))) + 2.0**-22
    assert abs(ops.log_sum_exp(x) - ref) <= limit


def test_log_sum_exp_of_normalised_values_is_zero(isa, rng):
    x = torch.log_softmax(torch.randn(151936, generator=rng).double() * 3, 0).float()
    assert abs(ops.log_sum_exp(x)) <= 3e-7


@pytest.mark.parametrize("n", [1, 2, 33, 500])
@pytest.mark.parametrize("at", [0, -1])
def test_log_sum_exp_special_values(isa, n, at):
    x = torch.full((n,), -INF)
    assert ops.log_sum_exp(x) == -INF
    x[at] = 3.0
    assert ops.log_sum_exp(x) == 3.0
    x[at] = INF
    assert ops.log_sum_exp(x) == INF
    x[at] = NAN
    assert math.isnan(ops.log_sum_exp(x))
    x[n // 2] = INF
    x[at] = NAN
    assert math.isnan(ops.log_sum_exp(x))
    x[:] = 0.0
    x[at] = NAN
    assert math.isnan(ops.log_sum_exp(x))


def test_independent_of_threads(isa, rng):
    x = torch.randn(100_003, generator=rng)
    threads = _C.op_threads()
    results = set()
    for count in (1, 2, 3):
        _C.set_op_threads(count)
        results.add((ops.argmax(x), ops.log_sum_exp(x)))
    _C.set_op_threads(threads)
    assert len(results) == 1


@pytest.mark.parametrize("op", [ops.argmax, ops.log_sum_exp])
def test_wrong_input_is_named(op):
    with pytest.raises(ValueError, match=r"x is f32\[0\], expected f32\[n\], dense and not empty"):
        op(torch.zeros(0))
    with pytest.raises(ValueError, match=r"x is f32\[2, 3\], expected f32\[n\]"):
        op(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x is bf16\[3\], expected f32\[n\]"):
        op(torch.zeros(3, dtype=torch.bfloat16))
