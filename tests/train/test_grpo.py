"""qwen_native/train/grpo.py: a programmatic reward rises, and an interrupted run goes on."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch

from qwen_native.train import rl
from qwen_native.train.grpo import GrpoConfig, GrpoOptions, GrpoTrainer
from qwen_native.train.metrics import Metrics


def lower_case(record, text):
    """Share of the six letters of an answer that are in lower case."""
    return sum(letter.isascii() and letter.islower() for letter in text) / 6


def prompts():
    texts = ("hi", "do", "me", "so")
    encoder = tiny.encoder()
    return [rl.Prompt(encoder.prompt([{"role": "user", "content": t}]), {}) for t in texts]


def trainer(folder, steps, **changes):
    rollout = rl.RolloutOptions(n=8, max_new_tokens=6, top_p=1.0, threads=1)
    config = GrpoConfig(
        tiny.MODEL, rl.PromptOptions((), 64), rl.RewardOptions(verifier="number"),
        tiny.optim(1e-2), tiny.run_options(folder, steps, 8, **changes), rollout,
        GrpoOptions(kl_coefficient=0.001),
    )  # fmt: skip
    judge = rl.Judge(tiny.encoder(), lower_case, None, 1024)
    reference = tiny.model().requires_grad_(False)
    return GrpoTrainer(config, tiny.model(), reference, prompts(), judge, Metrics(folder, True))


def test_the_reward_rises_and_the_kl_is_reported(tmp_path):
    trainer(tmp_path, 14).train()
    rewards = tiny.metrics_of(tmp_path, "reward")
    assert rewards[0] < 0.2 and rewards[-1] > 0.5
    kl = tiny.metrics_of(tmp_path, "kl")
    assert abs(kl[0]) < 1e-5 and kl[-1] > 0.5
    assert max(tiny.metrics_of(tmp_path, "engine_max_difference")) < 1e-5
    assert tiny.metrics_of(tmp_path, "engine_mean_ratio") == pytest.approx([1.0] * 14, abs=1e-5)


def test_interrupted_is_uninterrupted(tmp_path):
    whole = trainer(tmp_path / "whole", 5)
    whole.train()
    first = trainer(tmp_path / "parts", 5, save_every=2)
    for _ in range(3):
        first._step()
        if first.step == 2:
            first.save()
    second = trainer(tmp_path / "parts", 5)
    second.resume()
    assert second.step == 2
    second.train()
    for name in ("reward", "loss", "kl"):
        assert tiny.metrics_of(tmp_path / "parts", name) == tiny.metrics_of(
            tmp_path / "whole", name
        )
    for ours, theirs in zip(second.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_one_answer_is_no_group(tmp_path):
    with pytest.raises(ValueError, match="rollout.n is 1, expected a group of at least 2"):
        GrpoConfig(
            tiny.MODEL, rl.PromptOptions(()), rl.RewardOptions(verifier="number"),
            tiny.optim(1.0), tiny.run_options(tmp_path, 1, 1), rl.RolloutOptions(n=1),
        )  # fmt: skip
