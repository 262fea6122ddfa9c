"""qwen_native/train/objectives.py against closed forms and numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qwen_native.train import objectives as o


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_pairwise_logistic_loss():
    loss = o.pairwise_logistic_loss(f64(2.0, 0.0, -1.0), f64(0.0, 0.0, 1.0))
    expected = [math.log1p(math.exp(-2)), math.log(2), math.log1p(math.exp(2))]
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    far = o.pairwise_logistic_loss(f64(-1000.0), f64(1000.0))  # where exp would overflow
    assert far.item() == 2000


def test_dpo_loss():
    beta = 0.1
    loss, margin = o.dpo_loss(f64(-10.0), f64(-14.0), f64(-11.0), f64(-12.0), beta)
    assert margin.item() == pytest.approx(beta * (1 - -2), rel=1e-12)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-12)
    same, zero = o.dpo_loss(f64(-10.0), f64(-14.0), f64(-10.0), f64(-14.0), beta)
    assert same.item() == pytest.approx(math.log(2)) and zero.item() == 0


def test_dpo_gradient_pushes_apart():
    """d loss / d chosen = -beta sigmoid(-margin), the opposite for rejected."""
    chosen, rejected = f64(-3.0).requires_grad_(), f64(-2.0).requires_grad_()
    loss, margin = o.dpo_loss(chosen, rejected, f64(-3.5), f64(-2.0), 0.5)
    loss.sum().backward()
    expected = -0.5 / (1 + math.exp(margin.item()))
    assert chosen.grad.item() == pytest.approx(expected, rel=1e-12)
    assert rejected.grad.item() == pytest.approx(-expected, rel=1e-12)


def test_kl_estimate_has_the_kl_as_its_mean():
    p, q = f64(0.5, 0.3, 0.2), f64(0.2, 0.2, 0.6)
    estimate = o.kl_estimate(p.log(), q.log())
    assert (estimate >= 0).all()
    kl = (p * (p / q).log()).sum()
    assert (p * estimate).sum().item() == pytest.approx(kl.item(), rel=1e-12)


def test_penalised_rewards_end_with_the_score():
    log_probs, reference = f64(-1.0, -2.0, -3.0), f64(-1.5, -1.0, -3.0)
    rewards = o.penalised_rewards(f64(10.0, 20.0), log_probs, reference, [0, 2, 3], 0.04)
    np.testing.assert_allclose(rewards, [-0.02, 10.04, 20.0], rtol=1e-12)


def gae_by_sums(rewards, values, gamma, lam):
    """The definition: A_t = sum over l of (gamma lam)^l delta_{t + l}."""
    following = np.append(values[1:], 0.0)
    delta = rewards + gamma * following - values
    n = len(rewards)
    return np.array(
        [sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, n)) for t in range(n)]
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_defining_sum_within_each_response(gamma, lam):
    rng = np.random.default_rng(0)
    boundaries = [0, 1, 6, 13]
    rewards, values = rng.standard_normal(13), rng.standard_normal(13)
    advantages, returns = o.gae(
        torch.from_numpy(rewards), torch.from_numpy(values), boundaries, gamma, lam
    )
    for begin, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        expected = gae_by_sums(rewards[begin:end], values[begin:end], gamma, lam)
        np.testing.assert_allclose(advantages[begin:end], expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(returns[begin:end], expected + values[begin:end], rtol=1e-12)


def test_gae_with_lambda_1_returns_the_reward_to_go():
    rewards = f64(0.0, -1.0, 5.0)
    _, returns = o.gae(rewards, f64(3.0, 1.0, 2.0), [0, 3], 1.0, 1.0)
    np.testing.assert_allclose(returns, [4.0, 4.0, 5.0], rtol=1e-12)


def test_whitened():
    x = o.whitened(f64(1.0, 2.0, 3.0, 6.0))
    assert x.mean().item() == pytest.approx(0, abs=1e-12)
    assert x.std(correction=0).item() == pytest.approx(1, rel=1e-7)
    assert o.whitened(f64(2.0, 2.0)).tolist() == [0, 0]


def test_group_advantages():
    rewards = f64(1.0, 3.0, 5.0, 5.0)
    np.testing.assert_allclose(o.group_advantages(rewards, 2), [-1, 1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(o.group_advantages(rewards, 2, scale=False), [-1, 1, 0, 0])
    np.testing.assert_allclose(o.group_advantages(rewards * 4, 4, scale=False), [-10, -2, 6, 6])
    tenths = torch.full((8,), 0.1)  # whose float32 mean is not exactly 0.1
    assert o.group_advantages(tenths, 8).abs().max() < 1e-6
    with pytest.raises(ValueError, match="4 rewards, expected a multiple of group_size 3"):
        o.group_advantages(rewards, 3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # beyond 1 + clip and better: held
        (0.5, 2.0, -1.0, -1.0),  # below and worse: not held
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipped_policy_loss(ratio, advantage, loss, gradient):
    log_probs = f64(math.log(ratio) - 1.0).requires_grad_()
    value, clipped = o.clipped_policy_loss(log_probs, f64(-1.0), f64(advantage), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-12)
    assert log_probs.grad.item() == pytest.approx(gradient, rel=1e-12)
    assert clipped.item() == (gradient == 0.0)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 1.0, 3.0, 2.0, -2.0),
        (1.4, 1.0, 3.0, 0.5 * 1.85**2, 0.0),  # moved too far towards the target: held
        (0.4, 1.0, 3.0, 0.5 * 2.6**2, -2.6),  # moved away from it: pulled back
    ],
)
def test_clipped_value_loss(value, old, target, loss, gradient):
    x = f64(value).requires_grad_()
    result, clipped = o.clipped_value_loss(x, f64(old), f64(target), 0.15)
    result.sum().backward()
    assert result.item() == pytest.approx(loss, rel=1e-12)
    assert x.grad.item() == pytest.approx(gradient, rel=1e-12)
    assert clipped.item() == (gradient == 0.0)


def test_running_moments_are_those_of_all_values_seen():
    rng = np.random.default_rng(1)
    batches = [1e3 + rng.standard_normal(n) * 7 for n in (1, 5, 2, 0, 100)]
    moments = o.RunningMoments()
    for batch in batches:
        moments.update(torch.from_numpy(batch))
    everything = np.concatenate(batches)
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(everything.mean(), rel=1e-13)
    assert moments.deviation == pytest.approx(everything.std(), rel=1e-10)
    again = o.RunningMoments()
    again.load_state_dict(moments.state_dict())
    assert again == moments
    x = f64(1001.0)
    assert moments.normalised(x, scale=False).item() == pytest.approx(1001 - everything.mean())
    scaled = moments.normalised(x, scale=True).item()
    assert scaled == pytest.approx((1001 - everything.mean()) / everything.std())


def test_running_moments_of_equal_values_do_not_divide_by_zero():
    moments = o.RunningMoments()
    moments.update(f64(2.0, 2.0))
    assert moments.normalised(f64(2.0, 3.0), scale=True).tolist() == [0.0, 1.0]
