"""qwen_native/train/rollout.py against the engine loaded from disk and against the torch model."""

from __future__ import annotations

import math

import pytest
import torch
from model.tiny import make_checkpoint

from qwen_native import LLM
from qwen_native.config import ModelConfig
from qwen_native.nn import Qwen
from qwen_native.train import lora
from qwen_native.train.rollout import NativePolicy, Sampling

PROMPTS = [[5, 6, 7, 8], [9, 10], [11] * 70]


def torch_log_probs(model, prompt, tokens):
    ids = torch.tensor(prompt + tokens)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), cu_seqlens)[len(prompt) - 1 : -1]
        return model.kernels.linear_log_prob(hidden, model.head_weight, ids[len(prompt) :])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_what_the_saved_model_gives(tmp_path, kind, dtype):
    """Bit for bit the log-probabilities of an engine that read the same weights from disk."""
    make_checkpoint(tmp_path / "base", kind, tie=kind == "qwen3")
    model = Qwen.load(tmp_path / "base", dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save(tmp_path / "now")
    saved = LLM(tmp_path / "now", context=256)
    native = NativePolicy(model, context=256)
    responses = native.sample(PROMPTS, Sampling(max_new_tokens=20), [2], seed=4)
    assert [r.prompt for r in responses] == [p for p in PROMPTS for _ in range(2)]
    for response in responses:
        assert 1 <= len(response.tokens) <= 20
        assert response.finish_reason == ("stop" if response.tokens[-1] == 2 else "length")
        scores = saved.score(response.prompt + response.tokens)[len(response.prompt) - 1 :]
        assert response.log_probs == scores.tolist()
        assert torch.equal(
            native.score(response.prompt + response.tokens)[-1], torch.tensor(scores[-1])
        )
    assert responses[0].tokens != responses[1].tokens


@pytest.mark.parametrize("adapted", [False, True])
def test_log_probs_are_those_of_the_torch_model(tmp_path, adapted):
    """The ratio of an unchanged policy is 1 within 1e-5 in float32."""
    make_checkpoint(tmp_path / "base", "qwen3", initializer_range=0.1)
    model = Qwen.load(tmp_path / "base")
    if adapted:
        lora.add_adapter(model, lora.LoraConfig(rank=4, dropout=0.0))
        with torch.no_grad():
            for parameter in lora.adapter_parameters(model):
                parameter.normal_(0, 0.1)
    native = NativePolicy(model, context=256)
    for response in native.sample(PROMPTS, Sampling(max_new_tokens=30), [2], seed=0):
        ours = torch_log_probs(model, response.prompt, response.tokens)
        difference = ours - torch.tensor(response.log_probs)
        assert difference.exp().sub(1).abs().max() < 1e-5


def test_the_original_qwen(tmp_path):
    """Its fused projections and its names."""
    config = ModelConfig(
        architecture="qwen", hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=16, vocab_size=80, rms_norm_eps=1e-6, rope_theta=10000.0,
        rope_dim=16, max_position_embeddings=128, tie_word_embeddings=False, qkv_bias=True,
        qk_norm=False, sliding_window=None, max_window_layers=2, yarn=None, use_dynamic_ntk=True,
        use_logn_attn=True, seq_length=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    response = NativePolicy(model, context=64).sample([[3, 4]], Sampling(n=1), [], seed=0)[0]
    assert len(response.tokens) == 62
    ours = torch_log_probs(model, [3, 4], response.tokens)
    torch.testing.assert_close(ours, torch.tensor(response.log_probs), rtol=0, atol=1e-5)


def test_the_distribution_drawn_from(tmp_path):
    """drawn_log_probs: log-softmax at the temperature, over the tokens that top-p keeps."""
    make_checkpoint(tmp_path / "base", "qwen2", initializer_range=0.1)
    model = Qwen.load(tmp_path / "base")
    sampling = Sampling(max_new_tokens=30, top_p=0.6, temperature=0.7, n=1)
    [response] = NativePolicy(model, context=256).sample([[5, 6]], sampling, [], seed=0)
    ids = torch.tensor(response.prompt + response.tokens)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)), cu_seqlens)
        logits = (hidden @ model.head_weight.T)[1:-1].double() / 0.7
    for row, token, drawn in zip(logits, response.tokens, response.drawn_log_probs, strict=True):
        probability, order = row.softmax(-1).sort(descending=True)
        ahead = probability.cumsum(-1) - probability
        kept = {
            int(t): float(p) for t, p, a in zip(order, probability, ahead, strict=True) if a < 0.6
        }
        assert drawn == pytest.approx(math.log(kept[token] / sum(kept.values())), abs=1e-4)


def test_a_new_policy_has_the_new_weights(tmp_path):
    make_checkpoint(tmp_path / "base", "qwen2")
    model = Qwen.load(tmp_path / "base")
    before = NativePolicy(model, context=64).score([3, 4, 5])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias", "up_proj.weight")):
                parameter.mul_(1.5)
    after = NativePolicy(model, context=64).score([3, 4, 5])
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, torch_log_probs(model, [3], [4, 5]), rtol=0, atol=1e-4)


def test_seeds_decide(tmp_path):
    make_checkpoint(tmp_path / "base", "qwen2", initializer_range=0.05)
    model = Qwen.load(tmp_path / "base")

    def draw(seed, threads):
        native = NativePolicy(model, context=128, threads=threads)
        responses = native.sample(PROMPTS, Sampling(max_new_tokens=8, top_p=1.0), [], seed)
        return [r.tokens for r in responses]

    assert draw(1, 1) == draw(1, 2)
    assert draw(1, 1) != draw(2, 1)
    assert len({tuple(tokens) for seed in range(4) for tokens in draw(seed, 2)}) == 24


def test_unusable_models_and_prompts_are_refused(tmp_path):
    make_checkpoint(tmp_path / "base", "qwen2")
    with pytest.raises(ValueError, match=r"the model is torch.float64, expected float32 or bf"):
        NativePolicy(Qwen.load(tmp_path / "base", torch.float64), context=64)
    model = Qwen.load(tmp_path / "base")
    with pytest.raises(
        ValueError, match="the prompt has 70 tokens, expected fewer than the context"
    ):
        NativePolicy(model, context=64).sample(PROMPTS, Sampling(), [], 0)
    with torch.no_grad():
        model.embedding.weight[7] = math.nan
    with pytest.raises(RuntimeError, match="logits have NaN"):
        NativePolicy(model, context=64).sample([[7]], Sampling(), [], 0)
