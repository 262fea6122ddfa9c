"""qwen_native/train/ppo.py: a programmatic reward rises, also memory-lean; resume; parts."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_training as tiny
import torch
from train.test_grpo import lower_case, prompts

from qwen_native.train import lora, rl
from qwen_native.train.metrics import Metrics
from qwen_native.train.ppo import CRITIC, PpoConfig, PpoOptions, PpoTrainer
from qwen_native.train.scalar import ScalarModel


def trainer(folder, steps, *, lean=False, rate=1e-2, rollout=None, pretraining=None, **changes):
    options = {"value_warmup": 2, "kl_coefficient": 0.001, "epochs": 2, "minibatches": 2, **changes}
    run = tiny.run_options(folder, steps, 16, save_every=options.pop("save_every", 0))
    config = PpoConfig(
        tiny.MODEL, rl.PromptOptions((), 64), rl.RewardOptions(verifier="number"),
        tiny.optim(rate), tiny.optim(3e-3), run,
        rollout or rl.RolloutOptions(n=2, max_new_tokens=6, top_p=1.0, threads=1),
        PpoOptions(**options),
    )  # fmt: skip
    policy = tiny.model(spread=4.0 if lean else 1.0)
    reference = None if lean else tiny.model().requires_grad_(False)
    critic = ScalarModel(tiny.model(1))
    if lean:
        adapter = lora.LoraConfig(rank=16, alpha=32.0, dropout=0.0)
        lora.add_adapter(policy, adapter, CRITIC)
        lora.add_adapter(policy, adapter)
        critic = ScalarModel(policy, CRITIC)
    judge = rl.Judge(tiny.encoder(), lower_case, None, 1024)
    return PpoTrainer(
        config, policy, critic, reference, prompts(), judge, Metrics(folder, True), pretraining
    )


class HalfSpace(rl.Judge):
    """Likes the tokens on one side of a plane through the embeddings: adapters can turn there."""

    def __call__(self, prompts, responses):
        side = tiny.model().embedding.weight[:, 0] > 0
        return torch.stack([side[torch.tensor(r.tokens)].float().mean() for r in responses])


def check_exactness_and_kl(folder):
    kl = tiny.metrics_of(folder, "kl")
    assert max(map(abs, kl[:3])) < 1e-5  # two steps that update the critic alone
    assert kl[-1] > 0.05
    assert max(tiny.metrics_of(folder, "engine_max_difference")) < 1e-5
    assert tiny.metrics_of(folder, "engine_mean_ratio") == pytest.approx([1.0] * len(kl), abs=1e-5)
    assert tiny.metrics_of(folder, "value_only")[:4] == [1, 1, 0, 0]


def test_the_reward_rises_and_the_kl_is_reported(tmp_path):
    trainer(tmp_path, 13).train()
    rewards = tiny.metrics_of(tmp_path, "reward")
    assert np.mean(rewards[:2]) < 0.2 and np.mean(rewards[-2:]) > 0.5
    check_exactness_and_kl(tmp_path)


def test_memory_lean(tmp_path):
    """Policy and critic are adapters, the reference is the bare base."""
    loop = trainer(tmp_path, 15, lean=True, rate=2e-2)
    loop.judge = HalfSpace(tiny.encoder(), None, None, 1024)
    base = [p.clone() for p in loop.policy.parameters() if not p.requires_grad]
    loop.train()
    rewards = tiny.metrics_of(tmp_path, "reward")
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1
    check_exactness_and_kl(tmp_path)
    still = [p for p in loop.policy.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, still, strict=True))


def test_interrupted_is_uninterrupted(tmp_path):
    whole = trainer(tmp_path / "whole", 5)
    whole.train()
    first = trainer(tmp_path / "parts", 5, save_every=2)
    for _ in range(4):
        first._step()
        if first.step == 3:
            first.save()
    second = trainer(tmp_path / "parts", 5)
    second.resume()
    assert second.step == 3 and second.moments.count == 3 * 32
    second.train()
    for name in ("reward", "loss", "value_loss", "kl", "running_reward"):
        assert tiny.metrics_of(tmp_path / "parts", name) == tiny.metrics_of(
            tmp_path / "whole", name
        )
    assert second.moments == whole.moments


def test_the_update_in_one_piece_and_in_parts_is_the_same(tmp_path):
    """Groups of a minibatch change the order of additions only."""
    losses = []
    for name, limit in (("whole", 1 << 20), ("parts", 60)):
        loop = trainer(tmp_path / name, 2, value_warmup=0)
        loop.limit = limit
        loop.train()
        losses.append(
            [tiny.metrics_of(tmp_path / name, key) for key in ("loss", "value_loss", "clipped")]
        )
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3, atol=1e-5)


def test_the_kl_penalty_holds_the_policy(tmp_path):
    ends = []
    for name, coefficient in (("free", 0.0), ("held", 1.0)):
        trainer(tmp_path / name, 8, kl_coefficient=coefficient).train()
        ends.append(tiny.metrics_of(tmp_path / name, "kl")[-1])
    assert ends[1] < ends[0] / 3
