"""qwen_native/train/dpo.py: DPO raises a programmatic preference and holds to the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny_training as tiny
import torch

from qwen_native.train import lora
from qwen_native.train.distributed import World
from qwen_native.train.dpo import DpoModel
from qwen_native.train.metrics import Metrics
from qwen_native.train.preference import (
    PairTrainer,
    ShuffledSamples,
    answer_sample,
    pair_sample,
    target_log_probs,
)
from qwen_native.train.rollout import NativePolicy, Sampling

ALONE = World(0, 1, torch.device("cpu"), distributed=False)
LETTERS = tuple(range(64, 90))  # ids of the letters in the byte vocabulary's order


def pairs(preferred, count, seed):
    """Answers of six bytes: of the preferred ones, and of anything else."""
    rng = np.random.default_rng(seed)
    prompt = tiny.encoder().prompt([{"role": "user", "content": "hi"}])
    others = np.setdiff1d(np.arange(256), preferred)
    return [
        pair_sample(prompt, rng.choice(preferred, 6).tolist(), rng.choice(others, 6).tolist())
        for _ in range(count)
    ]


def drawn(policy):
    """64 answers of six tokens."""
    prompt = tiny.encoder().prompt([{"role": "user", "content": "hi"}])
    engine = NativePolicy(policy, context=64, threads=1)
    return engine.sample([prompt], Sampling(max_new_tokens=6, top_p=1.0, n=64), [], 0)


def share_of(preferred, policy):
    return float(np.mean([t in preferred for r in drawn(policy) for t in r.tokens]))


def train(folder, model, preferred, rate, steps=15):
    loop = PairTrainer(
        model, ShuffledSamples(pairs(preferred, 64, 1), 16, 0, pairs(preferred, 32, 2)),
        tiny.optim(rate), tiny.run_options(folder, steps, 16), ALONE, steps, 2048,
        Metrics(folder, True),
    )  # fmt: skip
    loop.train()


@pytest.mark.parametrize("adapted", [False, True])
def test_the_preferred_becomes_likelier(tmp_path, adapted):
    if adapted:  # something that adapters can say
        policy, reference = tiny.wide_model(), None
        lora.add_adapter(policy, lora.LoraConfig(rank=8, alpha=16.0, dropout=0.0))
        preferred = [i for i in range(256) if tiny.on_one_side()[i]]
    else:
        policy, reference, preferred = tiny.model(), tiny.model(), LETTERS
    model = DpoModel(policy, reference, beta=0.1)
    before = share_of(preferred, policy)
    losses, margins = model.pair_losses(pairs(preferred, 4, 0))
    assert torch.allclose(losses, torch.tensor(math.log(2.0))) and margins.abs().max() < 1e-5
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    train(tmp_path, model, preferred, 1e-2 if adapted else 3e-3)
    assert tiny.metrics_of(tmp_path, "validation_accuracy")[-1] >= 0.95
    after = share_of(preferred, policy)
    assert (before < 0.6 and after > 0.9) if adapted else (before < 0.25 and after > 2.5 * before)
    still = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(frozen, still, strict=True))


def test_beta_holds_the_policy_to_the_reference(tmp_path):
    """KL(policy || reference) per token, of answers that the policy gives after training."""
    divergences = []
    for name, beta in (("free", 0.02), ("held", 2.0)):
        policy, reference = tiny.model(), tiny.model()
        train(tmp_path / name, DpoModel(policy, reference, beta), LETTERS, 3e-3, steps=8)
        responses = drawn(policy)
        samples = [answer_sample(r.prompt, r.tokens) for r in responses]
        with torch.no_grad():
            theirs, _ = target_log_probs(reference, samples)
        ours = torch.tensor([p for r in responses for p in r.log_probs])
        divergences.append(float((ours - theirs).mean()))
    assert 0 < 2 * divergences[1] < divergences[0]
