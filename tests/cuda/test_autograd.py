"""`qwen_native.autograd` and `qwen_native.nn` on CUDA tensors: a model, forward and backward,
against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cuda_gpu
import pytest
import torch
from cuda_arrays import Caller, GpuTensor
from tiny_training import model as make_model
from tolerance import assert_contraction
from torch.overrides import TorchFunctionMode

from qwen_native import autograd
from qwen_native.nn import Qwen


class _Transfers(TorchFunctionMode):
    """`.to("cuda")` of tensors that the host has."""

    def __init__(self, gpu: Caller) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and args[1:] == (torch.device("cuda", 0),):
            return args[0] if isinstance(args[0], GpuTensor) else GpuTensor.of(self.gpu, args[0])
        return func(*args, **kwargs or {})


@pytest.fixture
def tensors(gpu: Caller, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes CUDA tensors."""
    if isinstance(gpu.sim, cuda_gpu.Gpu):
        pytest.skip("stands in for torch's CUDA tensors")
    stream = SimpleNamespace(cuda_stream=gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    with _Transfers(gpu):
        yield lambda x: GpuTensor.of(gpu, x)


def run(model: Qwen, state: dict[str, torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, Any]:
    """The loss and its gradients."""
    leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
    loss = torch.func.functional_call(model, leaves, tuple(inputs))
    loss.backward()
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@pytest.mark.parametrize("window", [None, 8])
def test_model(gpu, tensors, rng, window):
    shape = {
        "hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 64, "rope_dim": 64, "qk_norm": window is not None, "sliding_window": window,
        "max_window_layers": 0, "tie_word_embeddings": window is None,
    }  # fmt: skip
    plain = make_model(**shape)
    native = Qwen(plain.config, "native")
    state = {name: value.detach().bfloat16() for name, value in plain.named_parameters()}
    lengths = [19, 22]
    tokens = torch.randint(0, 320, (sum(lengths),), generator=rng)
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor([0, 19, 41], dtype=torch.int32)
    targets = tokens.roll(-1)
    targets[18] = -100
    inputs = [tokens, positions, ends, targets]
    expected = run(plain, {name: value.double() for name, value in state.items()}, inputs)
    base = run(plain, state, inputs)
    device_state = {name: tensors(value) for name, value in state.items()}
    results = run(native, device_state, [tensors(x) for x in inputs])
    gpu.wait()
    for name, ref in expected.items():
        result, torch_result = results[name].memory, base[name]
        assert_contraction(result.float(), ref, torch_result.float(), 3.0)
    launched = {launch.name for launch in gpu.sim.recorded_launches()}
    assert launched >= {
        "rms_norm", "rms_norm_bwd", "rope_pairs", "swiglu", "swiglu_bwd", "packed_attention",
        "gemm_bf16", "gemm_input_grad", "gemm_weight_grad", "softmax_xent",
    }, launched  # fmt: skip


def test_products_that_the_kernels_cannot_do_are_torchs(gpu, tensors, rng):
    for shape in [(5, 12), (5, 16)]:
        x, weight = (torch.randn(n, shape[1], generator=rng).bfloat16() for n in (5, 24))
        out = autograd.linear(tensors(x), tensors(weight))
        gpu.wait()
        wide = x.double() @ weight.double().T
        assert_contraction(out.memory, wide, x @ weight.T)
        ours = {launch.name for launch in gpu.sim.recorded_launches()}
        assert ("gemm_bf16" in ours) == (shape[1] % 8 == 0)
