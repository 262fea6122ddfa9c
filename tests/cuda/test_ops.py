"""`qwen_native.ops` on arrays of a GPU: DLPack capsules over the simulated device's memory, with
work queued on a stream that the array names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cuda_arrays import Caller, GpuArray
from gradients import FACTOR, gradients
from tolerance import assert_contraction, assert_pointwise

from qwen_native import devices, ops, reference


def random(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(gpu, rng, dtype):
    x, residual, weight = (
        random(rng, 3, 72, dtype=dtype),
        random(rng, 3, 72, dtype=dtype),
        random(rng, 72),
    )
    total = (residual.float() + x.float()).to(dtype)
    into = gpu.array(residual)
    out, after = gpu.tensors(ops.rms_norm(gpu.array(x), gpu.array(weight), 1e-6, into), into)
    assert torch.equal(after, total)
    expected = reference.rms_norm(total.double(), weight.double(), 1e-6)
    assert_pointwise(out, expected, reference.rms_norm(total, weight, 1e-6))


def test_gradients_of_rms_norm(gpu, rng):
    x, dy, weight = random(rng, 40, 136), random(rng, 40, 136), random(rng, 136)
    results = ops.rms_norm_bwd(gpu.array(dy), gpu.array(x), gpu.array(weight), 1e-6)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return reference.rms_norm(x, weight, 1e-6)

    expected = gradients(norm, (x.double(), weight.double()), dy.double())
    base = gradients(norm, (x, weight), dy)
    for out, ref, plain in zip(gpu.tensors(*results), expected, base, strict=True):
        assert_contraction(out, ref, plain, 3.0)


def test_swiglu_and_its_gradients(gpu, rng):
    gate, up, dout = (random(rng, 3, 100) for _ in range(3))
    arrays = gpu.array(gate), gpu.array(up)
    out = ops.swiglu(*arrays)
    grads = ops.swiglu_bwd(gpu.array(dout), *arrays)
    results = gpu.tensors(out, *grads)
    wide = [x.double() for x in (gate, up)]
    expected = [reference.swiglu(*wide), *gradients(reference.swiglu, wide, dout.double())]
    base = [reference.swiglu(gate, up), *gradients(reference.swiglu, (gate, up), dout)]
    for result, ref, plain in zip(results, expected, base, strict=True):
        assert_contraction(result, ref, plain, 3.0)


def test_rope(gpu, rng):
    x, angle = random(rng, 3, 4, 64), torch.rand((3, 32), generator=rng)
    into = gpu.array(x)
    assert ops.rope(into, gpu.array(angle.cos()), gpu.array(angle.sin())) is into
    (out,) = gpu.tensors(into)
    expected = reference.rope(x.double(), angle.cos().double(), angle.sin().double())
    assert_contraction(out, expected, reference.rope(x, angle.cos(), angle.sin()))


def test_softmax_xent(gpu, rng):
    logits, targets = random(rng, 3, 50), torch.tensor([49, -1, 50], dtype=torch.int32)
    (log_prob,) = gpu.tensors(ops.softmax_xent(gpu.array(logits), gpu.array(targets)))
    expected = logits[0].double().log_softmax(0)[49]
    assert abs(log_prob[0].double() - expected) < 1e-5
    # A target that is not in the vocabulary shows: the host has not looked.
    assert log_prob[1] == 0 and torch.isnan(log_prob[2])


@pytest.mark.parametrize("window", [0, 20])
def test_packed_attention_and_its_gradients(gpu, rng, window):
    q, k, v, dout = (random(rng, 70, heads, 64) for heads in (4, 2, 2, 4))
    ends = torch.tensor([0, 33, 70], dtype=torch.int32)
    arrays = [gpu.array(x) for x in (q, k, v)]
    device_ends = gpu.array(ends)
    out, lse = ops.packed_attention(*arrays, device_ends, 0.125, window)
    grads = ops.packed_attention_bwd(gpu.array(dout), *arrays, out, lse, device_ends, 0.125, window)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return reference.attention(q, k, v, ends, 0.125, window)

    results = gpu.tensors(out, *grads)
    wide = [x.double() for x in (q, k, v)]
    expected = [attention(*wide), *gradients(attention, wide, dout.double())]
    for result, ref in zip(results, expected, strict=True):
        # Probabilities and their gradients are rounded to bf16 on the way.
        assert (result.double() - ref).abs().max() <= 2**-6 * ref.abs().max()


@pytest.mark.parametrize("ends", [[0, 20, 90], [-5, 70], [0, 40, 30]])
def test_ends_of_documents_are_cut_to_the_tokens(gpu, rng, ends):
    q, k, v = (random(rng, 70, heads, 64) for heads in (2, 1, 1))
    arrays = [gpu.array(x) for x in (q, k, v)]
    out, _ = ops.packed_attention(*arrays, gpu.array(torch.tensor(ends, dtype=torch.int32)), 0.125)
    gpu.tensors(out)  # the executor reports what lies outside


def test_adamw(gpu, rng):
    state = [random(rng, 45, dtype=torch.float32).abs() for _ in range(3)]
    grad = random(rng, 45)
    arrays = [gpu.array(x) for x in state]
    ops.adamw(*arrays, gpu.array(grad), step=3, rate=0.01, weight_decay=0.1)
    results = gpu.tensors(*arrays)
    ops.adamw(*state, grad, step=3, rate=0.01, weight_decay=0.1)
    for result, expected in zip(results, state, strict=True):
        assert torch.allclose(result, expected, rtol=1e-6, atol=0)


def product(a: torch.Tensor, b: torch.Tensor, *, a_t: bool, b_t: bool) -> torch.Tensor:
    return (a.T if a_t else a) @ (b.T if b_t else b)


@pytest.mark.parametrize(("a_t", "b_t"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("add", [False, True])
def test_matmul(gpu, rng, a_t, b_t, dtype, add):
    m, n, k = 24, 40, 72
    a = random(rng, *((k, m) if a_t else (m, k)))
    b = random(rng, *((n, k) if b_t else (k, n)))
    bias, old = random(rng, n), random(rng, m, n, dtype=dtype)
    out = gpu.array(old)
    options = {"a_transposed": a_t, "b_transposed": b_t, "out": out, "add": add}
    assert ops.matmul(gpu.array(a), gpu.array(b), gpu.array(bias), **options) is out
    (result,) = gpu.tensors(out)
    rest = bias.double() + (old.double() if add else 0)
    expected = product(a.double(), b.double(), a_t=a_t, b_t=b_t) + rest
    plain = (product(a, b, a_t=a_t, b_t=b_t) + rest).to(dtype)
    assert_contraction(result, expected, plain, 3.0)


def test_what_matmul_asks_on_a_gpu(gpu, rng):
    a, narrow = gpu.array(random(rng, 24, 24)), gpu.array(random(rng, 24, 12))
    with pytest.raises(ValueError, match="both true, expected at most one on a GPU"):
        ops.matmul(a, a, a_transposed=True, b_transposed=True)
    with pytest.raises(ValueError, match="b is bf16.*expected multiples of 8 elements"):
        ops.matmul(a, narrow)
    with pytest.raises(ValueError, match="expected elements to sum"):
        ops.matmul(
            gpu.empty((0, 16), torch.bfloat16), gpu.empty((0, 8), torch.bfloat16), a_transposed=True
        )


def packed_on_gpu(gpu: Caller, matrix: torch.Tensor, format: str) -> tuple[Any, torch.Tensor]:
    """A quantised weight on the GPU, and the float32 matrix that it stands for."""
    data = matrix.numpy().view(np.uint8).ravel()
    packed = ops.pack_weight(data, "F32", tuple(matrix.shape), format)
    words = torch.from_numpy(packed.data.view(np.int32).copy())
    weight = ops.gpu_weight(gpu.array(words), format, packed.shape)
    assert (weight.format, weight.shape) == (format, packed.shape)
    return weight, torch.from_numpy(ops.unpack_weight(packed))


QUANTISED = ["int8", "int8_grouped", "int4_symmetric"]


@pytest.mark.parametrize("format", ["bf16", *QUANTISED])
@pytest.mark.parametrize("tokens", [1, 20])
def test_linear(gpu, rng, format, tokens):
    """Two weights side by side, the second with a bias."""
    x, bias = random(rng, tokens, 96), random(rng, 24)
    shapes = [(72, 96), (24, 96)]
    weights, values = [], []
    for shape in shapes:
        matrix = random(rng, *shape, dtype=torch.float32)
        if format == "bf16":
            values.append(matrix.bfloat16().float())
            weights.append(gpu.array(matrix.bfloat16()))
        else:
            weight, value = packed_on_gpu(gpu, matrix, format)
            weights.append(weight)
            values.append(value)
    out = ops.linear(gpu.array(x), weights, [None, gpu.array(bias)])
    (result,) = gpu.tensors(out)
    stacked = torch.cat(values)
    added = torch.cat([torch.zeros(72), bias.float()])
    expected = x.double() @ stacked.double().T + added
    assert_contraction(result, expected, (x.float() @ stacked.T + added).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_adds(gpu, rng, dtype):
    x, weight, old = random(rng, 3, 64), random(rng, 40, 64), random(rng, 3, 40, dtype=dtype)
    out = gpu.array(old)
    assert ops.linear(gpu.array(x), gpu.array(weight), out=out, add=True) is out
    (result,) = gpu.tensors(out)
    expected = old.double() + x.double() @ weight.double().T
    assert_contraction(result, expected, (old.float() + x.float() @ weight.float().T).to(dtype))


def test_what_linear_asks_on_a_gpu(gpu, rng):
    x, weight = gpu.array(random(rng, 2, 64)), gpu.array(random(rng, 20, 64))
    wide = gpu.array(random(rng, 20, 64, dtype=torch.float32))
    with pytest.raises(ValueError, match="weight is f32, expected bf16, int8"):
        ops.linear(x, wide)
    with pytest.raises(ValueError, match="x is f32.*expected bf16"):
        ops.linear(wide, weight)
    with pytest.raises(ValueError, match="out begins at no multiple of 16 bytes"):
        ops.linear(x, [weight, weight])
    with pytest.raises(ValueError, match="expected bf16.20., dense"):
        ops.linear(x, weight, gpu.array(random(rng, 20, dtype=torch.float32)))
    packed = ops.pack_weight(np.zeros(4 * 64 * 4, np.uint8), "F32", (4, 64), "int8")
    with pytest.raises(ValueError, match="is on the CPU, expected a GPU"):
        ops.linear(x, packed)
    with pytest.raises(ValueError, match="packed is i32.5. on a GPU, expected dense i32"):
        ops.gpu_weight(gpu.array(torch.zeros(5, dtype=torch.int32)), "int8", (4, 64))
    with pytest.raises(ValueError, match="format is bf16, expected int8"):
        ops.gpu_weight(gpu.array(torch.zeros(5, dtype=torch.int32)), "bf16", (4, 64))


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_w8a8(gpu, rng, tokens, with_bias):
    x, scales = random(rng, tokens, 112), torch.rand(40, generator=rng) * 0.01
    codes = torch.randint(-127, 128, (40, 112), generator=rng, dtype=torch.int8)
    bias = random(rng, 40)
    out = ops.linear_w8a8(
        *map(gpu.array, (x, codes, scales)), gpu.array(bias) if with_bias else None
    )
    (result,) = gpu.tensors(out)
    largest = x.float().abs().amax(1, keepdim=True)
    rounded = (x.float() * (127 / largest)).round().double() * (largest.double() / 127)
    rest = bias.double() if with_bias else 0
    expected = rounded @ (codes.double() * scales.double()[:, None]).T + rest
    assert_contraction(result, expected, expected.bfloat16())


def test_what_linear_w8a8_asks(gpu, rng):
    x, scales = random(rng, 2, 32), torch.ones(8)
    codes = torch.zeros((8, 32), dtype=torch.int8)
    with pytest.raises(ValueError, match="x is on the CPU, expected a GPU"):
        ops.linear_w8a8(x, codes, scales)
    arrays = [gpu.array(v) for v in (x, codes, scales)]
    with pytest.raises(ValueError, match="codes is bf16.*expected int8 on a GPU"):
        ops.linear_w8a8(arrays[0], gpu.array(random(rng, 8, 32)), arrays[2])
    with pytest.raises(ValueError, match="scales is f32.7., expected dense f32.8."):
        ops.linear_w8a8(*arrays[:2], gpu.array(torch.ones(7)))


@pytest.mark.parametrize("format", ["bf16", *QUANTISED])
def test_gather(gpu, rng, format):
    matrix = random(rng, 70, 96, dtype=torch.float32)
    value, table = matrix.bfloat16().float(), gpu.array(matrix.bfloat16())
    if format != "bf16":
        table, value = packed_on_gpu(gpu, matrix, format)
    ids = torch.tensor([69, 0, 70, 3, -1], dtype=torch.int32)
    (rows,) = gpu.tensors(ops.gather(gpu.array(ids), table))
    inside = torch.tensor([True, True, False, True, False])
    assert torch.equal(rows[inside], value[ids[inside].long()].bfloat16())
    # An id that the table does not have shows: the host has not looked.
    assert torch.isnan(rows[~inside]).all()


@pytest.mark.parametrize("format", ["bf16", "int4_symmetric"])
def test_mlp(gpu, rng, format):
    x, old = random(rng, 3, 64), random(rng, 3, 64)
    weights, values = [], []
    for shape in [(96, 64), (96, 64), (64, 96)]:
        matrix = random(rng, *shape, dtype=torch.float32) * 0.1
        weight, value = gpu.array(matrix.bfloat16()), matrix.bfloat16().float()
        if format != "bf16":
            weight, value = packed_on_gpu(gpu, matrix, format)
        weights.append(weight)
        values.append(value)
    out = gpu.array(old)
    assert ops.mlp(out, gpu.array(x), *weights) is out
    (result,) = gpu.tensors(out)

    def mlp(dtype: torch.dtype) -> torch.Tensor:
        gate, up, down = (v.to(dtype) for v in values)
        inner = reference.swiglu(x.to(dtype) @ gate.T, x.to(dtype) @ up.T)
        return old.to(dtype) + inner @ down.T

    assert_contraction(result, mlp(torch.float64), mlp(torch.bfloat16), 3.0)


@pytest.mark.parametrize("dweight_dtype", [torch.bfloat16, torch.float32])
def test_linear_xent(gpu, rng, dweight_dtype):
    hidden, weight = random(rng, 20, 64), random(rng, 72, 64) * 0.2
    targets = torch.randint(0, 72, (20,), generator=rng, dtype=torch.int32)
    targets[3] = -1
    grad = random(rng, 20, dtype=torch.float32)
    dhidden, dweight = gpu.empty((20, 64), torch.bfloat16), gpu.empty((72, 64), dweight_dtype)
    arrays = [gpu.array(v) for v in (hidden, weight, targets)]
    log_prob = ops.linear_xent(*arrays, 0.7, gpu.array(grad), dhidden, dweight, chunk_tokens=8)
    forward = ops.linear_xent(*arrays, 0.7, chunk_tokens=8)
    *results, alone = gpu.tensors(log_prob, dhidden, dweight, forward)
    assert torch.equal(alone, results[0])

    def log_probs(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)) * 0.7
        return -torch.nn.functional.cross_entropy(
            logits, targets.long(), ignore_index=-1, reduction="none"
        )

    inputs = hidden.double(), weight.double()
    expected = [log_probs(*inputs), *gradients(log_probs, inputs, grad.double())]
    plain = [log_probs(hidden, weight), *gradients(log_probs, (hidden, weight), grad)]
    for result, ref, base in zip(results, expected, plain, strict=True):
        assert_contraction(result, ref, base.to(result.dtype), FACTOR)


def test_what_linear_xent_asks(gpu, rng):
    hidden, weight = random(rng, 4, 64), random(rng, 16, 64)
    targets = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(ValueError, match="hidden is on the CPU, expected a GPU"):
        ops.linear_xent(hidden, weight, targets)
    arrays = [gpu.array(v) for v in (hidden, weight, targets)]
    with pytest.raises(ValueError, match="expected a multiple of 8 rows"):
        ops.linear_xent(arrays[0], gpu.array(random(rng, 15, 64)), arrays[2])
    with pytest.raises(ValueError, match="targets is i32.5., expected dense i32.4."):
        ops.linear_xent(*arrays[:2], gpu.array(torch.zeros(5, dtype=torch.int32)))
    with pytest.raises(ValueError, match="chunk_tokens is 0, expected at least 1"):
        ops.linear_xent(*arrays, chunk_tokens=0)
    with pytest.raises(ValueError, match="scale is 0, expected a positive number"):
        ops.linear_xent(*arrays, 0.0)
    with pytest.raises(ValueError, match="dhidden is bf16.3, 64., expected bf16.4, 64."):
        dhidden = gpu.empty((3, 64), torch.bfloat16)
        ops.linear_xent(*arrays, 1.0, gpu.array(torch.ones(4)), dhidden)


def test_tensors_on_two_devices(gpu, rng):
    x, weight = random(rng, 3, 72), random(rng, 72)
    with pytest.raises(ValueError, match="is on the CPU, expected a GPU as the other tensors"):
        ops.rms_norm(gpu.array(x), weight)
    with pytest.raises(ValueError, match="is on GPU 1, expected GPU 0"):
        ops.rms_norm(GpuArray(gpu, gpu.sim.upload(x), 1), gpu.array(weight))


def test_ops_of_the_cpu_alone(gpu, rng):
    x = gpu.array(random(rng, 8, dtype=torch.float32))
    for op in (ops.argmax, ops.log_sum_exp, ops.squared_norm):
        with pytest.raises(ValueError, match="the CPU, the only device that has this op"):
            op(x)
    pool = torch.zeros((1, ops.kv_page_bytes(32, 1, 64, "bf16") // 4), dtype=torch.int32)
    pages = ops.KvPages(gpu.array(pool), 32, 1, 64, "bf16")
    with pytest.raises(ValueError, match="the only device that has this op"):
        ops.attention(random(rng, 1, 1, 64, dtype=torch.float32), pages, [])


def test_what_only_the_gpus_kernels_ask(gpu, rng):
    x = gpu.array(random(rng, 4, 2, 48))
    ends = gpu.array(torch.tensor([0, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="head_dim is 48, expected 64, 80, 96 or 128 on a GPU"):
        ops.packed_attention(x, x, x, ends, 1.0)
    wide = gpu.array(random(rng, 4, 2, 64, dtype=torch.float32))
    with pytest.raises(ValueError, match="is f32, expected bf16 on a GPU"):
        ops.packed_attention(wide, wide, wide, ends, 1.0)
    rows = gpu.array(random(rng, 1, 8200))
    with pytest.raises(ValueError, match="8200 columns, expected at most 8192"):
        ops.rms_norm_bwd(rows, rows, gpu.array(random(rng, 8200)))


def test_without_cuda_kernels(sim, rng, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "cuda_library", lambda: tmp_path / "libqn_cuda.so")
    caller = Caller(sim)
    x, weight = caller.array(random(rng, 3, 72)), caller.array(random(rng, 72))
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
        ops.rms_norm(x, weight)
    caller.close()
