"""What alignment optimises: preference losses, and advantages and clipped losses of RL.

Pure functions of tensors. Per-token quantities of several responses are flat, [tokens], one
response after the other; `boundaries` [n + 1] says where each begins and the last one ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_logistic_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return -log sigmoid(chosen - rejected) per pair (Bradley-Terry; Stiennon et al. 2020).

    Args:
        chosen, rejected: [pairs], rewards of the better and of the worse response.
    """
    return -F.logsigmoid(chosen - rejected)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the implicit reward margin of each pair (Rafailov et al. 2023, eq. 7).

    Loss -log sigmoid(margin), margin = beta * (log-ratio of chosen - log-ratio of rejected), where
    a response's log-ratio is its log-probability under the policy minus that under the reference.

    Args:
        chosen, rejected: [pairs], summed log-probabilities of the responses under the policy.
        reference_chosen, reference_rejected: the same under the reference model.
        beta: how strongly the policy is held to the reference.
    """
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -F.logsigmoid(margin), margin


def kl_estimate(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return exp(d) - d - 1 with d = reference - log_probs, per token.

    Its mean over tokens drawn from the policy is KL(policy || reference), and no single value is
    negative (Schulman 2020, "Approximating KL divergence", k3).
    """
    difference = reference - log_probs
    return torch.expm1(difference) - difference


def penalised_rewards(
    scores: Tensor,
    log_probs: Tensor,
    reference: Tensor,
    boundaries: Sequence[int],
    coefficient: float,
) -> Tensor:
    """Return each token's reward: minus coefficient * log(p / p_reference), plus at a response's
    last token its score (Ouyang et al. 2022; the report's §3.2.2 has coefficient 0.04).

    Args:
        scores: [n], one per response.
        log_probs, reference: [tokens], log-probabilities under the policy that drew the tokens and
            under the reference model.
    """
    rewards = -coefficient * (log_probs - reference)
    last = torch.as_tensor(boundaries[1:], device=rewards.device) - 1
    return rewards.index_add(0, last, scores.to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, boundaries: Sequence[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns [tokens] by generalised advantage estimation.

    Schulman et al. 2016 (arXiv 1506.02438):
    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, both V and A being 0
    after a response's last token; returns are A + V.

    Args:
        rewards: [tokens].
        values: [tokens], the value before each token was drawn.
    """
    r, v = rewards.tolist(), values.tolist()
    advantages = [0.0] * len(r)
    for begin, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        following = next_value = 0.0
        for t in reversed(range(begin, end)):
            following = r[t] + gamma * next_value - v[t] + gamma * lam * following
            advantages[t] = following
            next_value = v[t]
    result = torch.tensor(advantages, dtype=values.dtype, device=values.device)
    return result, result + values


def whitened(x: Tensor) -> Tensor:
    """Return x with mean 0 and standard deviation 1; zeros when all are equal."""
    centred = x - x.mean()
    if x.numel() == 0 or bool(x.max() == x.min()):
        return torch.zeros_like(x)
    return centred / (centred.square().mean().sqrt() + 1e-8)


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """Return (reward - mean of its group) / standard deviation of its group.

    GRPO (Shao et al. 2024, arXiv 2402.03300).

    Args:
        rewards: [n], the responses to one prompt next to each other, group_size each.
        scale: False leaves the division out (Liu et al. 2025, "Dr. GRPO"). A group whose rewards
            are all equal gets 0 either way.

    Raises:
        ValueError: the number of rewards is not a multiple of group_size.
    """
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(
            f"there are {rewards.numel()} rewards, expected a multiple of group_size {group_size}"
        )
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-8)
    # The mean of equal rewards may differ from them in the last bit, which must not be scaled up.
    alike = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return torch.where(alike, torch.zeros_like(centred), centred).reshape(-1)


def clipped_policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return max(-A r, -A clamp(r, 1 - clip, 1 + clip)) per token, r = p / p_old, and whether the
    clamp decided (PPO, Schulman et al. 2017, eq. 7).
    """
    ratio = torch.exp(log_probs - old_log_probs)
    plain = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, held), held > plain


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return 0.5 max((V - R)^2, (V_held - R)^2) per token, V_held being V kept within `clip` of its
    old value, and whether V_held decided (the report's §3.2.2 has clip 0.15).
    """
    held = old_values + (values - old_values).clamp(-clip, clip)
    plain_error, held_error = (values - returns).square(), (held - returns).square()
    return 0.5 * torch.maximum(plain_error, held_error), held_error > plain_error


@dataclass
class RunningMoments:
    """Mean and standard deviation of all values seen (Welford; batches after Chan et al. 1979).

    Attributes:
        count: values seen.
        mean: of them.
        squares: sum of their squared distances to the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Take in more values, any shape."""
        x = values.detach().double().reshape(-1)
        if x.numel() == 0:
            return
        n, mean = x.numel(), float(x.mean())
        total = self.count + n
        shift = mean - self.mean
        self.squares += float((x - mean).square().sum()) + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 before there are two different values."""
        return (self.squares / self.count) ** 0.5 if self.squares > 0 else 1.0

    def normalised(self, values: Tensor, *, scale: bool) -> Tensor:
        """Return values minus the running mean, with `scale` divided by the running deviation."""
        centred = values - self.mean
        return centred / self.deviation if scale else centred

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean = int(state["count"]), float(state["mean"])
        self.squares = float(state["squares"])
