"""`qwen-native train grpo`: group-relative policy optimisation.

Shao et al. 2024 (arXiv 2402.03300): several answers to each query; an answer's advantage is its
reward relative to the others of its group, so there is no critic. The policy is held to the
reference by a KL term in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qwen_native.nn import Qwen
from qwen_native.train import lora
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions, check_range
from qwen_native.train.lora import LoraOptions
from qwen_native.train.metrics import Metrics
from qwen_native.train.objectives import clipped_policy_loss, group_advantages, kl_estimate
from qwen_native.train.ppo import policy_parameters, reference_log_probs
from qwen_native.train.preference import copy_of, target_log_probs
from qwen_native.train.rl import (
    Experience,
    Judge,
    Prompt,
    PromptOptions,
    RewardOptions,
    RlTrainer,
    RolloutOptions,
    minibatches,
    run_trainer,
    set_up,
)
from qwen_native.train.session import parse, section

EXAMPLES = """
  qwen-native train grpo recipes/grpo_demo_lora.yaml
  qwen-native train grpo recipes/grpo_demo_lora.yaml data.files=gsm8k.jsonl reward.verifier=number
  qwen-native train grpo recipes/grpo_demo_lora.yaml reward.verifier=check.py:score rollout.n=4"""


@section
@dataclass(frozen=True)
class GrpoOptions:
    """The algorithm.

    Attributes:
        kl_coefficient: of the KL term in the loss, per token.
        clip: how far from 1 a probability ratio may move and still be rewarded for it.
        minibatches: updates that a step's answers are dealt out to.
        epochs: passes over a step's answers.
        scale_rewards: divide a group's rewards by their standard deviation.
    """

    kl_coefficient: float = 0.04
    clip: float = 0.2
    minibatches: int = 1
    epochs: int = 1
    scale_rewards: bool = True

    def __post_init__(self) -> None:
        check_range(
            self, kl_coefficient=(0.0, 1e3), clip=(1e-6, 1.0), minibatches=(1, 1 << 16),
            epochs=(1, 1 << 10),
        )  # fmt: skip


@dataclass(frozen=True)
class GrpoConfig:
    """A GRPO run. With `lora`, reference and policy share one frozen base."""

    model: ModelOptions
    data: PromptOptions
    reward: RewardOptions
    optim: OptimOptions
    run: RunOptions
    rollout: RolloutOptions = RolloutOptions(n=8, top_p=1.0)
    grpo: GrpoOptions = GrpoOptions()
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        if self.rollout.n < 2:
            raise ValueError("rollout.n is 1, expected a group of at least 2 answers")


class GrpoTrainer(RlTrainer):
    """The policy and its reference, and how a round of rollouts changes it."""

    def __init__(
        self,
        config: GrpoConfig,
        policy: Qwen,
        reference: Qwen | None,
        prompts: Sequence[Prompt],
        judge: Judge,
        metrics: Metrics,
    ) -> None:
        """
        Args:
            config: the run.
            policy: with or without adapters.
            reference: frozen; None = the policy's base without adapters.
            prompts: the queries.
            judge: gives rewards.
            metrics: where they go.
        """
        super().__init__(
            policy, policy_parameters(policy, reference), prompts, judge, config.rollout,
            config.data, config.optim, config.run, metrics,
        )  # fmt: skip
        self.options = config.grpo
        self.reference = None if reference is None else reference.eval()

    def update(self, experience: Experience, scores: Tensor) -> dict[str, float]:
        options, bounds = self.options, experience.boundaries
        reference = reference_log_probs(self.policy, self.reference, experience, self.limit)
        each = group_advantages(scores, self.rollout.n, scale=options.scale_rewards)
        lengths = [end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
        advantages = each.repeat_interleave(each.new_tensor(lengths).long())

        policy = self.optimisers["policy"]
        updates = options.minibatches * options.epochs
        totals = {"loss": 0.0, "clipped": 0.0, "gradient_norm": 0.0}
        for epoch in range(options.epochs):
            seed = self.run.seed * 1009 + self.step * 31 + epoch
            for groups in minibatches(experience, options.minibatches, self.limit, seed):
                count = sum(len(places) for _, places in groups)
                policy.accumulate()
                for samples, places in groups:
                    log_probs, _ = target_log_probs(self.policy, samples)
                    loss, clipped = clipped_policy_loss(
                        log_probs, experience.old_log_probs[places], advantages[places],
                        options.clip,
                    )  # fmt: skip
                    penalty = kl_estimate(log_probs, reference[places])
                    total = (loss + options.kl_coefficient * penalty).sum() / count
                    total.backward()  # type: ignore[no-untyped-call]
                    totals["loss"] += float(total.detach())
                    totals["clipped"] += float(clipped.float().mean()) * len(places) / count
                totals["gradient_norm"] += policy.step(self.learning_rate(self.optim))
        return {
            **{name: value / updates for name, value in totals.items()},
            "kl": float((experience.old_log_probs - reference).mean()),
            "kl_estimate": float(kl_estimate(experience.old_log_probs, reference).mean()),
            "equal_groups": float((each.reshape(-1, self.rollout.n) == 0).all(1).float().mean()),
        }


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config, options = parse(
        GrpoConfig, argv, "grpo", "Reinforcement learning with groups of answers.", EXAMPLES
    )
    setup = set_up(config, resume=options.resume)
    policy, judge, metrics = setup.policy, setup.judge, setup.metrics
    reference = None
    if config.lora is not None:
        lora.prepare_beside_reference(policy, config.lora, metrics.say)
    else:
        reference = copy_of(policy).requires_grad_(False)
    trainer = GrpoTrainer(config, policy, reference, setup.prompts, judge, metrics)
    models = [model for model in (policy, reference, judge.model) if model is not None]
    run_trainer(config, options, trainer, models)
    return 0
