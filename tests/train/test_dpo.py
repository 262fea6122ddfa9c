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
from qwen_native.train.preference import PairTrainer, ShuffledSamples, pair_sample
from qwen_native.train.rollout import NativePolicy, Sampling

ALONE = World(0, 1, torch.device("cpu"), distributed=False)
LETTERS = range(64, 90)  # ids of the letters in the byte vocabulary's order


def pairs(count, seed):
    """Answers of six bytes: of letters, and of anything else."""
    rng = np.random.default_rng(seed)
    prompt = tiny.encoder().prompt([{"role": "user", "content": "hi"}])
    letters = np.array(LETTERS)
    others = np.setdiff1d(np.arange(256), letters)
    return [
        pair_sample(prompt, rng.choice(letters, 6).tolist(), rng.choice(others, 6).tolist())
        for _ in range(count)
    ]


def share_of_letters(policy):
    prompt = tiny.encoder().prompt([{"role": "user", "content": "hi"}])
    engine = NativePolicy(policy, context=64, threads=1)
    sampling = Sampling(max_new_tokens=6, top_p=1.0, n=64)
    drawn = [t for r in engine.sample([prompt], sampling, [], 0) for t in r.tokens]
    return float(np.mean([t in LETTERS for t in drawn]))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_preferred_becomes_likelier(tmp_path, adapted):
    policy = tiny.model(spread=4.0 if adapted else 1.0)
    reference = None if adapted else tiny.model()
    if adapted:
        lora.add_adapter(policy, lora.LoraConfig(rank=8, alpha=16.0, dropout=0.0))
    model = DpoModel(policy, reference, beta=0.1)
    before = share_of_letters(policy)
    losses, margins = model.pair_losses(pairs(4, 0))
    assert torch.allclose(losses, torch.tensor(math.log(2.0))) and margins.abs().max() < 1e-5
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    loop = PairTrainer(
        model, ShuffledSamples(pairs(64, 1), 16, 0, pairs(32, 2)),
        tiny.optim(1e-2 if adapted else 3e-3), tiny.run_options(tmp_path, 15, 16), ALONE, 15, 2048,
        Metrics(tmp_path, True),
    )  # fmt: skip
    loop.train()
    assert tiny.metrics_of(tmp_path, "validation_accuracy")[-1] >= (0.85 if adapted else 0.95)
    assert before < 0.25 and share_of_letters(policy) > (1.5 if adapted else 2.5) * before
    still = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(frozen, still, strict=True))
