"""qwen_native/train/lora.py against peft, against float64, and against the engine."""

from __future__ import annotations

import json
import weakref

import numpy as np
import pytest
import torch
from model.tiny import make_checkpoint
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_native import LLM, ops
from qwen_native.errors import CheckpointError
from qwen_native.nn import Qwen
from qwen_native.train import lora

IDS = [5, 9, 200, 31, 8, 77, 13, 300]


def run(model, ids=IDS):
    """Logits [tokens, vocab] of one document."""
    tokens = torch.tensor(ids)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    hidden = model(tokens, torch.arange(len(ids)), cu_seqlens)
    return hidden @ model.head_weight.T


def randomise(model, name=lora.POLICY, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(model, name):
            parameter.normal_(0, 0.1, generator=generator)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints, tied and untied."""
    made = {}
    for tie in (False, True):
        made[tie] = tmp_path_factory.mktemp("base") / "model"
        make_checkpoint(made[tie], "qwen2", tie=tie)
    return made


CONFIG = lora.LoraConfig(rank=4, alpha=8.0, dropout=0.0)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_peft_loads_what_we_write(folders, tmp_path, tie, embeddings):
    ours = Qwen.load(folders[tie])
    lora.add_adapter(ours, CONFIG)
    randomise(ours)
    if embeddings:
        lora.train_embeddings(ours)
        with torch.no_grad():
            ours.embedding.weight[5] += 0.5
            ours.head_weight[7] += 0.5
    lora.save_adapter(ours, tmp_path / "adapter", base="base")
    base = AutoModelForCausalLM.from_pretrained(folders[tie])
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0]
        # Both compute in float32; the logits are about 10 in size.
        torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-4)
        assert (run(ours) - run(Qwen.load(folders[tie]))).abs().max() > 0.1
        again = Qwen.load(folders[tie])
        lora.load_adapter(again, tmp_path / "adapter")
        assert torch.equal(run(again), run(ours))


def test_we_load_what_peft_writes(folders, tmp_path):
    torch.manual_seed(0)
    config = PeftConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folders[False]), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path)
    ours = Qwen.load(folders[False])
    lora.load_adapter(ours, tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "all"}, "bias is 'all', expected 'none'"),
        ({"r": "4"}, "r is '4', expected an integer"),
        ({"r": 0}, "rank is 0, expected at least 1"),
        ({"r": 5}, r"lora_A.weight is \(4, 160\), expected \(5, 160\)"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(folders, tmp_path, change, message):
    model = Qwen.load(folders[False])
    lora.add_adapter(model, CONFIG)
    lora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        lora.load_adapter(Qwen.load(folders[False]), tmp_path)


def test_damaged_adapters_are_refused(folders, tmp_path):
    model = Qwen.load(folders[False])
    lora.add_adapter(model, CONFIG)
    lora.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        lora.load_adapter(Qwen.load(folders[False]), tmp_path)
    save_file(tensors | {"base_model.model.model.norm.weight": torch.zeros(96)}, path)
    with pytest.raises(CheckpointError, match=r"model.norm.weight is not part of the model"):
        lora.load_adapter(Qwen.load(folders[False]), tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="adapter_model"):
        lora.load_adapter(Qwen.load(folders[False]), tmp_path)


def test_unknown_targets_and_settings_are_refused(folders):
    model = Qwen.load(folders[False])
    with pytest.raises(ValueError, match="targets has 'c_attn', expected names among down_proj"):
        lora.add_adapter(model, lora.LoraConfig(targets=("c_attn",)))
    for change in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            lora.LoraConfig(**change)
    with pytest.raises(ValueError, match="format is 'int3'"):
        lora.quantize_base(model, "int3")


def test_low_rank_gradients(dtype=torch.float32):
    """Of x, A, B and of what it is added to, against torch's own in float64."""
    generator = torch.Generator().manual_seed(0)
    adapter = lora.LowRank(7, 5, lora.LoraConfig(rank=3, alpha=6.0, dropout=0.0))
    with torch.no_grad():
        adapter.lora_B.normal_(generator=generator)
    x = torch.randn(11, 7, generator=generator, dtype=dtype).requires_grad_()
    w = torch.randn(5, 7, generator=generator, dtype=dtype).requires_grad_()
    upstream = torch.randn(11, 5, generator=generator, dtype=dtype)
    out = adapter(x @ w.T, x)
    out.backward(upstream)
    wide = [t.detach().double().requires_grad_() for t in (x, w, adapter.lora_A, adapter.lora_B)]
    expected = wide[0] @ wide[1].T + 2 * (wide[0] @ wide[2].T @ wide[3].T)
    expected.backward(upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((x, w, adapter.lora_A, adapter.lora_B), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_dropout_is_of_the_adapters_input_in_training_only():
    torch.manual_seed(0)
    adapter = lora.LowRank(400, 1, lora.LoraConfig(rank=1, alpha=1.0, dropout=0.25))
    with torch.no_grad():
        adapter.lora_A.fill_(1.0)
        adapter.lora_B.fill_(1.0)
    x = torch.ones(50, 400)
    kept = adapter(torch.zeros(50, 1), x)
    assert kept.mean().item() == pytest.approx(400, rel=0.02)  # scaled up by 1 / 0.75
    assert kept.std() > 1
    assert torch.equal(adapter.eval()(torch.zeros(50, 1), x), torch.full((50, 1), 400.0))


@pytest.mark.parametrize("format", lora.QUANTIZED_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_gradients_are_those_of_the_unpacked_matrix(isa, format, dtype):
    torch.manual_seed(1)
    linear = torch.nn.Linear(67, 45)
    layer = lora.QuantizedLinear.of(linear, format)
    matrix = torch.from_numpy(ops.unpack_weight(layer.packed))
    # half a step of 16 or 256 levels over a row's group of 32 columns, with room for the scales
    assert (matrix - linear.weight).abs().max() < {"int4": 0.02, "int8": 0.001}[format]
    x = torch.randn(9, 67).to(dtype).requires_grad_()
    upstream = torch.randn(9, 45).to(dtype)
    out = layer(x)
    out.backward(upstream)
    expected = upstream.double() @ matrix.double()
    base = upstream @ matrix.to(dtype)
    error = (x.grad.double() - expected).abs().max()
    assert error <= 2 * (base.double() - expected).abs().max() + 1e-6
    # x is rounded to int8 in groups: 1/254 of its largest value, summed over 67 columns.
    product = x.detach().double() @ matrix.double().T + linear.bias.double()
    assert (out.double() - product).abs().max() < 0.06
    assert not list(layer.parameters())


@pytest.mark.parametrize("architecture", ["qwen", "qwen2"])
def test_rounded_while_loaded_is_rounded_afterwards(tmp_path, architecture):
    """Also where a projection comes in three parts; no layer is kept once it is rounded."""
    make_checkpoint(tmp_path / "model", architecture)
    seen = []

    def convert(linear):
        assert all(weight() is None for weight in seen)
        seen.append(weakref.ref(linear.weight))
        return round_(linear)

    round_ = lora.rounding(lora.LoraOptions(quantize="int8"))
    model = Qwen.load(tmp_path / "model", torch.bfloat16, convert=convert)
    assert len(seen) == model.config.num_layers * len(lora.default_targets(model))
    lora.quantize_base(model, "int8")  # nothing is left to do
    other = Qwen.load(tmp_path / "model", torch.bfloat16)
    lora.quantize_base(other, "int8")
    with torch.no_grad():
        assert torch.equal(run(model), run(other))
    assert lora.rounding(None) is lora.rounding(lora.LoraOptions()) is None


def test_adapters_share_a_base(folders):
    """What PPO's memory-lean mode needs: policy, critic, and the bare base as the reference."""
    model = Qwen.load(folders[False])
    with torch.no_grad():
        bare = run(model)
        lora.add_adapter(model, CONFIG, "critic")
        randomise(model, "critic", seed=1)
        critic = run(model)
        lora.add_adapter(model, CONFIG)
        assert torch.equal(run(model), bare)  # B is zero at first
        randomise(model)
        policy = run(model)
        assert not torch.equal(policy, bare) and not torch.equal(policy, critic)
        with lora.active_adapter(model, "critic"):
            assert torch.equal(run(model), critic)
        with lora.active_adapter(model, None):
            assert torch.equal(run(model), bare)
        assert torch.equal(run(model), policy)
    run(model).sum().backward()
    assert all(p.grad is not None for p in lora.adapter_parameters(model))
    assert all(p.grad is None for p in lora.adapter_parameters(model, "critic"))
    adapters = {id(p) for n in ("critic", lora.POLICY) for p in lora.adapter_parameters(model, n)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == adapters


@pytest.mark.parametrize("tie", [False, True])
def test_merged_model_runs_in_the_engine(folders, tmp_path, tie):
    model = Qwen.load(folders[tie])
    lora.add_adapter(model, CONFIG)
    randomise(model)
    with torch.no_grad():
        adapted = run(model)
        lora.merge(model)
        assert not lora.lora_layers(model)
        torch.testing.assert_close(run(model), adapted, rtol=1e-4, atol=1e-4)
    model.save(tmp_path / "merged")
    engine = LLM(tmp_path / "merged", weights="f32").logits(IDS)
    np.testing.assert_allclose(engine, adapted.numpy(), rtol=1e-3, atol=1e-3)


def test_quantized_base_trains_and_merges_into_the_dense_model(folders):
    """QLoRA's adapter lowers a loss, and what it learnt holds on the unrounded base."""
    torch.manual_seed(2)
    model = Qwen.load(folders[False])
    lora.quantize_base(model, "int4")
    lora.add_adapter(model, lora.LoraConfig(rank=8, alpha=16.0, dropout=0.0))
    optimizer = torch.optim.Adam(lora.adapter_parameters(model), lr=0.01)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(run(model)[:-1], torch.tensor(IDS[1:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    dense = Qwen.load(folders[False])
    before = torch.nn.functional.cross_entropy(run(dense)[:-1], torch.tensor(IDS[1:])).item()
    lora.add_adapter(dense, lora.LoraConfig(rank=8, alpha=16.0, dropout=0.0))
    theirs, ours = lora.adapter_parameters(dense), lora.adapter_parameters(model)
    with torch.no_grad():
        for to, source in zip(theirs, ours, strict=True):
            to.copy_(source)
    after = torch.nn.functional.cross_entropy(run(dense)[:-1], torch.tensor(IDS[1:])).item()
    assert after < before / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_products_share_no_memory(rng, dtype):
    layers = [torch.nn.Linear(64, rows, bias=False) for rows in (96, 32, 160)]
    quantized = [lora.QuantizedLinear.of(layer, "int8") for layer in layers]
    x = torch.randn((7, 64), generator=rng).to(dtype).requires_grad_()
    results = [layer(x) for layer in quantized]
    kept = [result.detach().clone() for result in results]
    grads = [torch.autograd.grad(r.sum(), x, retain_graph=True)[0] for r in results]
    copies = [grad.clone() for grad in grads]
    again = [layer(x) for layer in quantized]
    for one, other in zip(results + again + grads, kept + kept + copies, strict=True):
        assert torch.equal(one, other)
