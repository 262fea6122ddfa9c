"""The engine with device="cuda-sim": the CUDA kernels under the SIMT executor, end to end.

The reference of logits is transformers in float32 with the weights as they are held (dequantised);
what transformers makes of the same model in bf16 says how far apart bf16 may be (docs/NUMERICS.md).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cuda_simulator
import numpy as np
import pytest
import torch
from cuda_gpu import library_of_environment
from cuda_simulator import Simulator
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_blocks import random_tensor
from model.tiny import logits, make_checkpoint
from tolerance import assert_contraction

from qwen_native import _C, LLM, ops
from qwen_native.checkpoint import open_checkpoint
from qwen_native.devices import open_device

GREEDY = {"temperature": 0.0, "ignore_eos": True}
SHAPES: dict[str, dict[str, Any]] = {
    # One kv head with five query heads; a window; odd sizes.
    "qwen2": {
        "hidden_size": 320, "num_heads": 5, "num_kv_heads": 1, "intermediate_size": 232,
        "sliding_window": 20, "max_window_layers": 1, "num_hidden_layers": 2,
    },
    "qwen3": {
        "hidden_size": 136, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "tie": True,
        "num_hidden_layers": 2,
    },
}  # fmt: skip


def simulated(monkeypatch: pytest.MonkeyPatch, target: str, memory: int = 256 << 20) -> Path:
    """Makes a simulator, or the GPU of QN_CUDA_LIBRARY, the device "cuda-sim"."""
    if path := library_of_environment():
        if target != "qn_cuda_sim_fast":
            pytest.skip("needs the executor")
        monkeypatch.setenv("QN_CUDA_SIM_LIBRARY", str(path))
        return path
    if tool := cuda_simulator.missing_build_tool():
        pytest.skip(f"the CUDA simulator cannot be built: {tool} is missing")
    path = cuda_simulator.build(target)
    monkeypatch.setenv("QN_CUDA_SIM_LIBRARY", str(path))
    monkeypatch.setenv("QN_SIM_MEMORY", str(memory))
    return path


@pytest.fixture(scope="module", autouse=True)
def fast_simulator() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        simulated(monkeypatch, "qn_cuda_sim_fast")
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """Folder and transformers model (float32, weights representable in bf16) of each generation."""
    made = {}
    for architecture, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp(architecture)
        model = make_checkpoint(folder, architecture, dtype=torch.bfloat16, **shape)
        made[architecture] = folder, model
    return made


def load(folder: Path, weights: str = "bf16", **options: Any) -> LLM:
    return LLM(folder, device="cuda-sim", weights=weights, **{"context": 200, **options})


def as_held(model: Any, weights: str) -> Any:
    """The model with its matrices as the GPU holds them."""
    format = {"int8": "int8", "int4": "int4_symmetric"}.get(weights)
    if format is None:
        return model
    result = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() == 2:
                rows, cols = parameter.shape
                data = parameter.numpy().reshape(-1).view(np.uint8)
                packed = ops.pack_weight(data, "F32", (rows, cols), format)
                parameter.copy_(torch.from_numpy(ops.unpack_weight(packed)))
    return result


def compare(actual: np.ndarray, model: Any, ids: list[int]) -> None:
    """Logits of the last positions: at most twice the error of transformers in bf16."""
    reference = logits(model, ids)[-len(actual) :].double()
    plain = logits(copy.deepcopy(model).bfloat16(), ids)[-len(actual) :].float()
    assert_contraction(torch.from_numpy(actual), reference, plain)


def random_ids(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, 331, count).tolist()


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_logits(checkpoints, architecture, weights):
    folder, model = checkpoints[architecture]
    llm = load(folder, weights)
    assert llm.device == "cuda-sim" and llm.kv_dtype == "bf16"
    ids = random_ids(70)
    compare(llm.logits(ids, last=70), as_held(model, weights), ids)


def test_chunks_of_a_prompt(checkpoints):
    folder, model = checkpoints["qwen2"]
    llm = load(folder)
    chunked = _C.Engine(
        llm.model, threads=1, context=200, cache_tokens=200, kv_dtype="bf16", max_step_tokens=19
    )
    ids = random_ids(70)
    compare(chunked.logits(ids, 70), model, ids)


@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("architecture", SHAPES)
def test_decoding(checkpoints, architecture, kv_dtype):
    """Log-probabilities of generated tokens, and greedy ones where the reference is decided."""
    folder, model = checkpoints[architecture]
    llm = load(folder, kv_dtype=kv_dtype)
    prompt = random_ids(60, seed=2)
    out = llm.generate(prompt, max_new_tokens=24, logprobs=0, **GREEDY)
    ids = prompt + out.token_ids
    expected = logits(model, ids)[len(prompt) - 1 : -1].double()
    plain = logits(copy.deepcopy(model).bfloat16(), ids)[len(prompt) - 1 : -1].float()
    chosen = torch.tensor(out.token_ids)[:, None]

    def log_probs(values: torch.Tensor) -> torch.Tensor:
        return values.double().log_softmax(-1).gather(1, chosen)[:, 0]

    base = log_probs(plain).float()
    if kv_dtype == "int8":  # and what such a cache costs on the CPU
        cpu = [
            LLM(folder, weights="bf16", kv_dtype=name).score(ids)[-len(chosen) :]
            for name in ("int8", "bf16")
        ]
        base += torch.from_numpy(cpu[0] - cpu[1])
    assert_contraction(torch.tensor(out.logprobs), log_probs(expected), base)
    top = expected.topk(2).values
    decided = (top[:, 0] - top[:, 1]) > 4 * (plain - expected).abs().amax(-1)
    assert kv_dtype == "int8" or decided.sum() >= 2
    assert kv_dtype == "int8" or torch.equal(chosen[decided, 0], expected.argmax(-1)[decided])


def test_int8_cache_with_large_key_biases(tmp_path):
    """The cache's keys are divided by what their biases make large, as on the CPU."""
    model = make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16, **SHAPES["qwen2"])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[5] = 120.0
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path)
    ids = random_ids(60)
    cpu = [
        LLM(tmp_path, weights="bf16", kv_dtype=name).logits(ids, last=20)
        for name in ("int8", "bf16")
    ]
    reference = logits(model, ids)[-20:].double()
    plain = logits(copy.deepcopy(model).bfloat16(), ids)[-20:].float()
    actual = torch.from_numpy(load(tmp_path, kv_dtype="int8").logits(ids, last=20))
    assert_contraction(actual, reference, plain + torch.from_numpy(cpu[0] - cpu[1]))


def test_packed_files(checkpoints, monkeypatch, tmp_path):
    folder, _ = checkpoints["qwen3"]
    monkeypatch.setenv("QN_CACHE", str(tmp_path))
    files = {
        weights: LLM(folder, weights=weights, packed_cache=True).packed_file
        for weights in ("int8", "int4")
    }
    ids = random_ids(20)
    packed, unpacked = load(files["int8"], "auto"), load(folder, "int8")
    assert np.array_equal(packed.logits(ids), unpacked.logits(ids))
    with pytest.raises(ValueError, match="is held as int4, which no GPU kernel reads; expected"):
        load(files["int4"], "auto")


def test_formats_of_gguf(tmp_path):
    """ "auto" holds Q8_0 and Q4_0 as they are and others, which have minima, as int8, side by side
    in one model."""
    shape = SHAPES["qwen2"] | {"intermediate_size": 256}
    model = make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16, **shape)
    config = open_checkpoint(tmp_path).config
    builder = _C.ModelBuilder(
        asdict(config) | {"max_position_embeddings": config.context_length},
        "auto",
        False,
        1,
        open_device("cuda-sim")[1],
    )
    for name, parameter in model.named_parameters():
        kinds = {"k_proj": "Q4_0", "down_proj": "Q4_K"}
        kind = next((kind for part, kind in kinds.items() if part in name), "Q8_0")
        data, size = parameter.detach().numpy(), tuple(parameter.shape)
        if parameter.dim() == 1:
            kind = "F32"
        elif kind == "Q4_K":
            data = random_tensor(kind, *size, np.random.default_rng(1), 2e-4)
            packed = ops.pack_weight(data, kind, size, "int8_grouped")
            parameter.data = torch.from_numpy(ops.unpack_weight(packed))
        else:
            data = quantize(data, GGMLQuantizationType[kind])
            parameter.data = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        builder.add(name, kind, list(parameter.shape), raw, lambda begin, end: None)
    held = builder.finish()
    assert set(held.bytes_by_format) == {"int8_grouped", "int4_symmetric"}
    engine = _C.Engine(held, threads=1, context=100, cache_tokens=100, kv_dtype="bf16")
    ids = random_ids(40)
    compare(engine.logits(ids, 40), model, ids)


def test_a_cache_too_small_for_all(checkpoints):
    """Sequences give their pages back and start over; an aborted one leaves room for the rest."""
    folder, _ = checkpoints["qwen2"]
    llm = load(folder)
    engine = _C.Engine(llm.model, threads=1, context=128, cache_tokens=256, kv_dtype="bf16")
    greedy = _C.SamplingParams(temperature=0.0)
    requests = [
        engine.add(random_ids(50, seed=n), greedy, max_new_tokens=20, stop_ids=[]) for n in range(5)
    ]
    tokens: dict[int, list[int]] = {request: [] for request in requests}
    while engine.has_work:
        for emitted in engine.step():
            tokens[emitted[0]].append(emitted[2])
        if len(tokens[requests[4]]) == 3:
            engine.abort(requests[4])
    assert [len(tokens[request]) for request in requests] == [20, 20, 20, 20, 3]


def test_batch_and_alone_are_the_same(checkpoints):
    """With invariant=True, bit for bit; five sequences are filled up to eight in a graph."""
    folder, _ = checkpoints["qwen3"]
    llm = load(folder, "int4", invariant=True)
    prompts = [random_ids(n, seed=n) for n in (3, 70, 1, 33, 12)]
    draw = {"max_new_tokens": 6, "temperature": 1.5, "seed": 5, "ignore_eos": True}
    together = llm.generate(prompts, logprobs=1, **draw)
    for prompt, one in zip(prompts, together, strict=True):
        alone = llm.generate(prompt, logprobs=1, **draw)
        assert (alone.token_ids, alone.logprobs) == (one.token_ids, one.logprobs)


def test_the_device_draws_what_the_host_would(checkpoints):
    """Log-probabilities make the host draw; the same seeds give the same tokens."""
    folder, _ = checkpoints["qwen2"]
    llm = load(folder)
    prompts = [random_ids(n, seed=n) for n in (5, 9, 40)]
    for options in (
        {"temperature": 1.3},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.7, "min_p": 0.02},
    ):
        draw = {"max_new_tokens": 8, "seed": 3, "ignore_eos": True, **options}
        on_device = llm.generate(prompts, **draw)
        on_host = llm.generate(prompts, logprobs=0, **draw)
        assert [out.token_ids for out in on_device] == [out.token_ids for out in on_host]


def test_penalties_and_forks(checkpoints):
    folder, _ = checkpoints["qwen2"]
    llm = load(folder)
    prompt = random_ids(70)
    plain = llm.generate(prompt, max_new_tokens=6, **GREEDY).token_ids
    banned = llm.generate(
        prompt, max_new_tokens=6, logit_bias={plain[0]: float("-inf")}, **GREEDY
    ).token_ids
    assert plain[0] not in banned
    draw = {"max_new_tokens": 5, "temperature": 1.5, "ignore_eos": True}
    forks = llm.generate(prompt, n=3, seed=11, **draw)
    for i, fork in enumerate(forks):
        alone = llm.generate(prompt, seed=11 + i, logprobs=0, **draw)
        assert alone.token_ids == fork.token_ids


def test_graphs_replay_what_steps_compute(checkpoints, monkeypatch):
    """Bit for bit: sequences start and end, so several shapes are captured and replayed."""
    folder, _ = checkpoints["qwen3"]
    prompts = [random_ids(n, seed=n) for n in (3, 70, 1)]
    results = []
    for enabled in ("1", "0"):
        monkeypatch.setenv("QN_CUDA_GRAPHS", enabled)
        llm = load(folder, "int8")
        outs = []
        for tokens in (4, 7):
            outs += llm.generate(prompts, max_new_tokens=tokens, logprobs=2, **GREEDY)
            outs += llm.generate(prompts[:2], max_new_tokens=tokens, temperature=2.0, seed=tokens)
        results.append([(out.token_ids, out.logprobs, out.top_logprobs) for out in outs])
    assert results[0] == results[1]
    monkeypatch.setenv("QN_CUDA_GRAPHS", "2")
    with pytest.raises(ValueError, match="QN_CUDA_GRAPHS is '2', expected 0 or 1"):
        load(folder)


def test_qwen1(golden):
    """Dynamic NTK and LogN across seq_length; the golden model's own bf16 error is not known, so
    that of the CPU with bf16 weights, whose activations are float32, is the measure."""
    folder = golden / "qwen1-tiny"
    data = dict(np.load(folder / "golden.npz"))
    cpu, gpu = LLM(folder, weights="bf16"), load(folder, context=600)
    for n in (17, 65, 129, 300):
        ids, expected = data[f"ids_{n}"].tolist(), data[f"logits_{n}"]
        errors = [np.abs(llm.logits(ids, last=len(expected)) - expected) for llm in (cpu, gpu)]
        rms = [float(np.sqrt(np.square(error).mean())) for error in errors]
        assert rms[1] <= 3 * rms[0], (n, rms)


def test_every_check_on(checkpoints, monkeypatch):
    """Prefill, decode, graphs and sampling without a report of the executor."""
    library = Simulator(simulated(monkeypatch, "qn_cuda_sim"))
    library.reset()
    folder, _ = checkpoints["qwen2"]
    llm = load(folder, "int4", kv_dtype="int8", context=64)
    prompts = [random_ids(21), random_ids(3), random_ids(5)]
    outs = llm.generate(prompts, max_new_tokens=4, temperature=1.0, seed=1, ignore_eos=True)
    assert [len(out.token_ids) for out in outs] == [4, 4, 4]
    del llm
    reports = library.take_reports()
    assert not reports, "\n" + "\n".join(map(str, reports))


@pytest.mark.skipif(library_of_environment() is not None, reason="a GPU's memory is what it is")
def test_too_little_memory(checkpoints, monkeypatch):
    folder, _ = checkpoints["qwen2"]
    llm = load(folder)
    with pytest.raises(RuntimeError, match=r"the KV cache takes \d{9} bytes, but \d+ of the \d+"):
        _C.Engine(llm.model, threads=1, context=200, cache_tokens=10**6, kv_dtype="bf16")
    monkeypatch.setenv("QN_SIM_MEMORY", "100000")
    with pytest.raises(RuntimeError, match=r"takes \d+ bytes, but 0 of the 100000 bytes of"):
        load(folder)


def test_mistakes_are_named(checkpoints, monkeypatch, tmp_path):
    folder, _ = checkpoints["qwen2"]
    with pytest.raises(
        ValueError, match="device is 'gpu', expected one of cpu, cuda, cuda-sim, au"
    ):
        LLM(folder, device="gpu")
    with pytest.raises(ValueError, match="weights is 'f32', expected another on a GPU"):
        load(folder, "f32")
    with pytest.raises(ValueError, match="kv_dtype is 'f32', expected another on a GPU"):
        load(folder, kv_dtype="f32")
    make_checkpoint(tmp_path, "qwen2")
    with pytest.raises(ValueError, match="head_dim is 16, expected 64, 80, 96 or 128"):
        load(tmp_path)
    monkeypatch.delenv("QN_CUDA_SIM_LIBRARY")
    with pytest.raises(RuntimeError, match="QN_CUDA_SIM_LIBRARY is not set"):
        load(folder)
    monkeypatch.setenv("QN_CUDA_SIM_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(RuntimeError, match="none.so cannot be loaded"):
        load(folder)


@pytest.mark.skipif(
    _C.Gpu.count(str(Path(_C.__file__).parent / "libqn_cuda.so")) > 0, reason="there is a GPU"
)
def test_without_a_gpu(checkpoints):
    folder, _ = checkpoints["qwen2"]
    with pytest.raises(RuntimeError, match="no CUDA kernels|no GPU was found"):
        LLM(folder, device="cuda")
    llm = LLM(folder, device="auto")
    assert llm.device == "cpu"
    assert any("device 'auto' is the CPU" in notice for notice in llm.notices)
