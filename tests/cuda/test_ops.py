"""`qwen_native.ops` on arrays of a GPU: DLPack capsules over the simulated device's memory, with
work queued on a stream that the array names."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import cuda_gpu
import pytest
import torch
from cuda_simulator import Buffer, Simulator
from gradients import gradients
from tolerance import assert_contraction, assert_pointwise

from qwen_native import _C, devices, ops, reference

CUDA = 2  # DLPack's kDLCUDA


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    _fields_ = [
        ("tensor", DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


CODES = {torch.float32: (2, 32), torch.bfloat16: (4, 16), torch.int32: (0, 32)}


class GpuArray:
    """An array in the simulated device's memory, as a library with DLPack would offer it."""

    def __init__(self, gpu: Gpu, buffer: Buffer, device: int = 0) -> None:
        self.gpu, self.buffer, self.device = gpu, buffer, device
        self.shape, self.dtype = buffer.shape, buffer.dtype
        dims = len(self.shape)
        strides = [torch.Size(self.shape[i + 1 :]).numel() for i in range(dims)]
        self._shape = (ctypes.c_int64 * dims)(*self.shape)
        self._strides = (ctypes.c_int64 * dims)(*strides)
        code, bits = CODES[self.dtype]
        self._managed = DLManagedTensor(
            DLTensor(
                buffer.pointer, CUDA, device, dims, code, bits, 1, self._shape, self._strides, 0
            )
        )
        self.streams: list[int] = []  # that were handed to __dlpack__

    def detach(self) -> GpuArray:
        return self

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "stream": self.gpu.stream}

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(self, *, stream: int | None = None) -> object:
        if stream is not None:
            self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return new(ctypes.addressof(self._managed), b"dltensor", None)

    def new_empty(self, shape: Sequence[int]) -> GpuArray:
        return self.gpu.empty(shape, self.dtype)

    def float(self) -> GpuArray:
        return self.gpu.empty(self.shape, torch.float32)


class Gpu:
    """The simulator with a stream of the caller's."""

    def __init__(self, sim: Simulator) -> None:
        self.sim = sim
        pointer = ctypes.c_void_p()
        assert sim.library.qn_gpu_stream_create(ctypes.byref(pointer)) == 0
        self.stream = pointer.value
        self.arrays: list[GpuArray] = []

    def array(self, tensor: torch.Tensor) -> GpuArray:
        self.arrays.append(GpuArray(self, self.sim.upload(tensor)))
        return self.arrays[-1]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> GpuArray:
        self.arrays.append(GpuArray(self, self.sim.empty(tuple(shape), dtype)))
        return self.arrays[-1]

    def tensors(self, *arrays: GpuArray) -> list[torch.Tensor]:
        """Their content when the stream is done. Nothing ran before: the work is on it."""
        before = self.sim.recorded_launches()
        assert self.sim.library.qn_gpu_stream_sync(ctypes.c_void_p(self.stream)) == 0
        if not isinstance(self.sim, cuda_gpu.Gpu):
            assert before == [] and self.sim.recorded_launches() != []
        used = {stream for array in self.arrays for stream in array.streams}
        assert used == {self.stream}
        return [array.buffer.tensor() for array in arrays]


@pytest.fixture
def gpu(sim: Simulator) -> Iterator[Gpu]:
    _C.set_op_gpu(_C.Gpu(str(sim.path)))
    caller = Gpu(sim)
    try:
        yield caller
    finally:
        assert sim.library.qn_gpu_stream_destroy(ctypes.c_void_p(caller.stream)) == 0
        _C.set_op_gpu(None)


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


def test_tensors_on_two_devices(gpu, rng):
    x, weight = random(rng, 3, 72), random(rng, 72)
    with pytest.raises(ValueError, match="is on the CPU, expected a GPU as the other tensors"):
        ops.rms_norm(gpu.array(x), weight)
    with pytest.raises(ValueError, match="is on GPU 1, expected GPU 0"):
        ops.rms_norm(GpuArray(gpu, gpu.sim.upload(x), 1), gpu.array(weight))


def test_ops_of_the_cpu_alone(gpu, rng):
    with pytest.raises(ValueError, match="device type is 2, expected the CPU"):
        ops.argmax(gpu.array(random(rng, 8, dtype=torch.float32)))


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
    caller = Gpu(sim)
    x, weight = caller.array(random(rng, 3, 72)), caller.array(random(rng, 72))
    with pytest.raises(RuntimeError, match="this build has no CUDA kernels"):
        ops.rms_norm(x, weight)
    assert sim.library.qn_gpu_stream_destroy(ctypes.c_void_p(caller.stream)) == 0
