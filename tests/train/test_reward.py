"""qwen_native/train/reward.py: a reward model learns a separable preference, and resumes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_training as tiny
import torch

from qwen_native.train.distributed import World
from qwen_native.train.metrics import Metrics
from qwen_native.train.preference import PairTrainer, ShuffledSamples, pair_sample
from qwen_native.train.scalar import ScalarModel

ALONE = World(0, 1, torch.device("cpu"), distributed=False)


def politeness(count, seed):
    """Pairs whose better answer has one "please" more; everything else is random letters."""
    rng = np.random.default_rng(seed)
    encoder = tiny.encoder()
    samples = []
    for _ in range(count):
        words = ["".join(rng.choice(list("abcdefgh"), 3)) for _ in range(3)]
        at = rng.integers(0, 3)
        polite = [*words[:at], "please", *words[at:]]
        prompt = encoder.prompt([{"role": "user", "content": words[0]}])
        samples.append(
            pair_sample(
                prompt, encoder.answer(" ".join(polite)), encoder.answer(" ".join([*words, "x"]))
            )
        )
    return samples


def trainer(folder, steps, **changes):
    torch.manual_seed(0)
    source = ShuffledSamples(politeness(160, 0), 16, 1, politeness(100, 1))
    options = tiny.run_options(folder, steps, 16, **changes)
    model = ScalarModel(tiny.model())
    metrics = Metrics(folder, True)
    return PairTrainer(model, source, tiny.optim(3e-3), options, ALONE, steps, 2048, metrics)


def test_separable_preferences_are_learnt(tmp_path):
    loop = trainer(tmp_path, 30)
    loop.train()
    [accuracy] = tiny.metrics_of(tmp_path, "validation_accuracy")
    [margin] = tiny.metrics_of(tmp_path, "validation_margin")
    [loss] = tiny.metrics_of(tmp_path, "validation_loss")
    assert accuracy >= 0.95
    assert margin > 1 and loss < 0.3


def test_interrupted_is_uninterrupted(tmp_path):
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    first = trainer(tmp_path / "parts", 6, save_every=3)
    for _ in range(4):
        first._step()
        if first.progress.step == 3:
            first.save()
    second = trainer(tmp_path / "parts", 6, save_every=3)
    second.resume()
    assert second.progress.step == 3
    second.train()
    losses = tiny.metrics_of(tmp_path / "whole", "loss")
    assert tiny.metrics_of(tmp_path / "parts", "loss") == losses
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_parts_of_a_batch_add_up(tmp_path):
    """Micro-batches change the order of additions only."""
    whole, parts = trainer(tmp_path / "a", 2), trainer(tmp_path / "b", 2)
    parts.micro_batch_tokens = 100
    whole.train()
    parts.train()
    losses = [tiny.metrics_of(tmp_path / name, "loss") for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
