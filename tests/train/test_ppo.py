"""qwen_native/train/ppo.py: a programmatic reward rises, also memory-lean; resume; parts."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_training as tiny
import torch
from train.test_grpo import lower_case, prompts

from qwen_native.train import lora, rl
from qwen_native.train.data import Batch, Sample
from qwen_native.train.metrics import Metrics
from qwen_native.train.ppo import (
    CRITIC,
    PpoConfig,
    PpoOptions,
    PpoTrainer,
    open_critic,
    target_values,
)
from qwen_native.train.preference import answer_sample
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
    policy = tiny.wide_model() if lean else tiny.model()
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


class OneSide(rl.Judge):
    """The share of an answer's tokens on one side of a plane: something that adapters can say."""

    def __call__(self, prompts, responses):
        good = tiny.on_one_side()
        return torch.stack([good[torch.tensor(r.tokens)].float().mean() for r in responses])


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
    loop = trainer(tmp_path, 15, lean=True, rate=5e-3)
    loop.judge = OneSide(tiny.encoder(), None, None, 1024)
    base = [p.clone() for p in loop.policy.parameters() if not p.requires_grad]
    loop.train()
    rewards = tiny.metrics_of(tmp_path, "reward")
    assert np.mean(rewards[:2]) < 0.6 and np.mean(rewards[-5:]) > 0.8
    check_exactness_and_kl(tmp_path)
    still = [p for p in loop.policy.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(base, still, strict=True))


class OneSequence:
    """A pretraining text of one sequence."""

    def __init__(self):
        rng = np.random.default_rng(5)
        tokens, targets = rng.integers(0, 256, (2, 20))
        targets[3] = -100
        self.sample = Sample(tokens, targets, (12, 8))

    def step(self, index):
        assert index == 0
        return [self.sample]


def wide_log_probs(model, sample):
    """log_softmax of all logits of a sample, [tokens, vocab] float64, by plain torch."""
    batch = Batch.of([sample])
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)
    return (hidden @ model.head_weight.T).log_softmax(-1)


def test_the_policy_gradient_with_its_pretraining_term(tmp_path):
    """Of the first update, in float64 from the definitions: the ratio is 1, so nothing is clipped.

    -mean_t A_t grad log p_t, A whitened, plus the coefficient times the gradient of the mean
    cross-entropy of the pretraining text.
    """
    coefficient, gamma, lam = 0.7, 0.9, 0.8
    loop = trainer(
        tmp_path, 1, value_warmup=0, epochs=1, minibatches=1, gamma=gamma, lam=lam,
        pretraining=OneSequence(), pretraining_coefficient=coefficient, pretraining_shards="given",
    )  # fmt: skip
    model, trunk = tiny.model().double(), tiny.model(1).double()
    head = loop.critic.score.detach().double()
    seen, update, step = {}, loop.update, loop.optimisers["policy"].step

    def watched(experience, scores):
        seen.update(experience=experience, scores=scores)
        return update(experience, scores)

    def caught(rate):
        gradients = loop.optimisers["policy"].gradients()
        seen["gradients"] = {name: g.clone() for name, g in gradients.items()}
        return step(rate)

    loop.update, loop.optimisers["policy"].step = watched, caught
    loop.train()

    samples = seen["experience"].samples
    scores = seen["scores"].double() - seen["scores"].double().mean()
    advantages, log_probs = [], []
    for sample, score in zip(samples, scores, strict=True):
        counted = torch.from_numpy(sample.targets != -100)
        batch = Batch.of([sample])
        with torch.no_grad():
            hidden = trunk(batch.tokens, batch.positions, batch.cu_seqlens)
            values = [*(hidden @ head)[counted].tolist(), 0.0]
        count = len(values) - 1
        rewards = [0.0] * (count - 1) + [float(score)]  # the reference is the policy: no penalty
        deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(count)]
        advantages += [
            sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, count)) for t in range(count)
        ]
        rows = wide_log_probs(model, sample)[counted]
        log_probs.append(rows.gather(1, batch.targets[counted][:, None])[:, 0])
    a = torch.tensor(advantages, dtype=torch.float64)
    a = (a - a.mean()) / a.std(correction=0)
    loss = -(a * torch.cat(log_probs)).mean()
    text = OneSequence().sample
    targets = torch.from_numpy(text.targets)
    cross_entropy = torch.nn.functional.nll_loss(wide_log_probs(model, text), targets)
    names, parameters = zip(*model.named_parameters(), strict=True)
    plain = torch.autograd.grad(loss, parameters, retain_graph=True)
    extra = torch.autograd.grad(coefficient * cross_entropy, parameters)
    largest = max(float(g.abs().max()) for g in plain)
    for name, one, other in zip(names, plain, extra, strict=True):
        torch.testing.assert_close(
            seen["gradients"][name].double(), one + other, rtol=1e-3, atol=1e-4 * largest
        )
    assert max(float(g.abs().max()) for g in extra) > 0.1 * largest


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


@pytest.mark.parametrize("lean", [False, True])
def test_a_new_critic_begins_at_zero(tmp_path, lean):
    adapter = lora.LoraOptions(rank=2, dropout=0.0) if lean else None
    config = PpoConfig(
        tiny.MODEL, rl.PromptOptions(()), rl.RewardOptions(verifier="number"), tiny.optim(1.0),
        tiny.optim(1.0), tiny.run_options(tmp_path, 1, 1), lora=adapter,
    )  # fmt: skip
    critic = open_critic(config, tiny.model(), lambda text: None)
    assert not target_values(critic, [answer_sample([1, 2], [3, 4])]).any()
