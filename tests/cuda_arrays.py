"""Arrays in the simulated device's memory, as other libraries offer theirs, with DLPack capsules
and a stream of the caller's; and a stand-in for torch's CUDA tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import cuda_gpu
import torch
from cuda_simulator import Buffer, Simulator
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves, tree_map

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


CODES = {
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
    torch.int32: (0, 32),
    torch.int8: (0, 8),
}


class DLPack:
    """What a DLPack capsule points to; it must outlive the capsule."""

    def __init__(
        self,
        pointer: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: torch.dtype,
        device: int = 0,
    ) -> None:
        dims = len(shape)
        self._shape, self._strides = (
            (ctypes.c_int64 * dims)(*shape),
            (ctypes.c_int64 * dims)(*strides),
        )
        code, bits = CODES[dtype]
        self._managed = DLManagedTensor(
            DLTensor(pointer, CUDA, device, dims, code, bits, 1, self._shape, self._strides, 0)
        )

    def capsule(self) -> object:
        new = ctypes.pythonapi.PyCapsule_New
        arguments = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        new.restype, new.argtypes = ctypes.py_object, arguments
        return new(ctypes.addressof(self._managed), b"dltensor", None)


class GpuArray:
    """An array in the simulated device's memory, as a library with DLPack would offer it."""

    def __init__(self, gpu: Caller, buffer: Buffer, device: int = 0) -> None:
        self.gpu, self.buffer, self.device = gpu, buffer, device
        self.shape, self.dtype = buffer.shape, buffer.dtype
        dense = [torch.Size(self.shape[i + 1 :]).numel() for i in range(len(self.shape))]
        self._dlpack = DLPack(buffer.pointer, self.shape, dense, self.dtype, device)
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
        return self._dlpack.capsule()

    def new_empty(self, shape: Sequence[int]) -> GpuArray:
        return self.gpu.empty(shape, self.dtype)

    def float(self) -> GpuArray:
        return self.gpu.empty(self.shape, torch.float32)

    def bfloat16(self) -> GpuArray:
        return self.gpu.empty(self.shape, torch.bfloat16)


class Caller:
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

    def wait(self) -> None:
        assert self.sim.library.qn_gpu_stream_sync(ctypes.c_void_p(self.stream)) == 0

    def close(self) -> None:
        assert self.sim.library.qn_gpu_stream_destroy(ctypes.c_void_p(self.stream)) == 0

    def tensors(self, *arrays: GpuArray) -> list[torch.Tensor]:
        """Their content when the stream is done. Nothing ran before: the work is on it."""
        before = self.sim.recorded_launches()
        self.wait()
        if not isinstance(self.sim, cuda_gpu.Gpu):
            assert before == [] and self.sim.recorded_launches() != []
        used = {stream for array in self.arrays for stream in array.streams}
        assert used == {self.stream}
        return [array.buffer.tensor() for array in arrays]


class GpuTensor(torch.Tensor):
    """A tensor in the simulated device's memory that says it is on "cuda".

    What torch's own CUDA kernels would do is done by its CPU kernels, in the order of the stream:
    work that is queued there is waited for. The package's custom ops run as they are.
    """

    gpu: Caller
    memory: torch.Tensor  # the same memory, as torch's CPU kernels take it

    @staticmethod
    def __new__(cls, gpu: Caller, memory: torch.Tensor) -> GpuTensor:
        # torch's C++ code, which has no CUDA here, is told "cpu".
        tensor: GpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.shape,
            strides=memory.stride(),
            storage_offset=memory.storage_offset(),
            dtype=memory.dtype,
            device="cpu",
        )
        tensor.gpu, tensor.memory = gpu, memory
        return tensor

    @classmethod
    def of(cls, gpu: Caller, tensor: torch.Tensor) -> GpuTensor:
        """A copy on the device."""
        return cls(gpu, _alias(gpu.sim.upload(tensor)))

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, *, stream: int) -> object:
        assert stream == self.gpu.stream
        pointer = self.memory.data_ptr()
        self._dlpack = DLPack(pointer, self.shape, self.memory.stride(), self.dtype)
        return self._dlpack.capsule()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "qwen_native":
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        gpu: Caller = next(x.gpu for x in leaves if isinstance(x, GpuTensor))
        gpu.wait()
        owned = {x.memory.untyped_storage().data_ptr() for x in leaves if isinstance(x, GpuTensor)}
        given = tree_map(lambda x: x.memory if isinstance(x, GpuTensor) else x, (args, kwargs))
        results = func(*given[0], **given[1] | ({"device": "cpu"} if "device" in kwargs else {}))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, GpuTensor):
                _mark_written(gpu, value.memory)
                return value

        def on_device(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or x.layout != torch.strided:
                return x  # torch alone has sparse gradients
            if x.untyped_storage().data_ptr() in owned:
                return cls(gpu, x)
            if func._schema.name.startswith(("aten::new_empty", "aten::empty")):
                return cls(gpu, _alias(gpu.sim.empty(x.shape, x.dtype)))
            return cls.of(gpu, x)

        return tree_map(on_device, results)


def _alias(buffer: Buffer) -> torch.Tensor:
    if buffer.bytes == 0:
        return torch.empty(buffer.shape, dtype=buffer.dtype)
    memory = (ctypes.c_char * buffer.bytes).from_address(buffer.pointer)
    return torch.frombuffer(memory, dtype=buffer.dtype).view(buffer.shape)


def _mark_written(gpu: Caller, memory: torch.Tensor) -> None:
    """Tells the executor that the host has written a tensor."""
    assert memory.is_contiguous()
    content, size = memory.clone(), memory.numel() * memory.itemsize
    assert not gpu.sim.library.qn_simt_upload(memory.data_ptr(), content.data_ptr(), size)
