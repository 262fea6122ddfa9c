"""`qwen-native train ppo`: proximal policy optimisation, as in the report (§3.2.2).

Each step samples answers with the native engine, lets the reward model judge them, and takes from
every token's reward the KL penalty against the reference model. Rewards are normalised by their
running mean, advantages are estimated with a critic (GAE), and policy and critic are updated with
clipped losses. The first steps update the critic alone.

What the report does not state has the usual default, see `PpoOptions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qwen_native.nn import Qwen
from qwen_native.train import lora
from qwen_native.train.config import ModelOptions, OptimOptions, RunOptions, check_range
from qwen_native.train.data import IGNORE, Batch, PackedText, Sample, micro_batches
from qwen_native.train.lora import LoraOptions, active_adapter, adapter_parameters
from qwen_native.train.metrics import Metrics
from qwen_native.train.objectives import (
    RunningMoments,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimate,
    penalised_rewards,
    whitened,
)
from qwen_native.train.optim import AdamW
from qwen_native.train.preference import copy_of, target_log_probs
from qwen_native.train.rl import (
    Experience,
    Judge,
    Prompt,
    PromptOptions,
    RewardOptions,
    RlTrainer,
    RolloutOptions,
    flat_log_probs,
    minibatches,
    run_trainer,
    set_up,
)
from qwen_native.train.scalar import ScalarModel
from qwen_native.train.session import parse, section
from qwen_native.train.shards import Shards

EXAMPLES = """
  qwen-native train ppo recipes/ppo_demo_lora.yaml
  qwen-native train ppo recipes/ppo_7b.yaml reward.model=runs/reward/model
  qwen-native train ppo recipes/ppo_demo_lora.yaml reward.verifier=check.py:score
  qwen-native train ppo recipes/ppo_demo_lora.yaml --resume"""

CRITIC = "critic"  # the adapter of the value head in the memory-lean mode


@section
@dataclass(frozen=True)
class PpoOptions:
    """The algorithm. KL coefficient, value clip and warm-up are the report's, which states nothing
    on the others: they have the defaults of Ouyang et al. 2022 and Schulman et al. 2017.

    Attributes:
        kl_coefficient: of the penalty per token.
        clip: how far from 1 a probability ratio may move and still be rewarded for it.
        value_clip: how far a value may move in one step.
        gamma: discount.
        lam: lambda of the advantage estimation.
        minibatches: updates that a step's answers are dealt out to.
        epochs: passes over a step's answers.
        value_warmup: first steps, in which only the critic learns.
        scale_rewards: also divide rewards by their running standard deviation.
        pretraining_coefficient: of the pretraining loss that is added to the policy's; 0 = none.
        pretraining_shards: token shards (`qwen-native train tokenize`) for it.
        critic: folder of a reward model or critic that the critic begins as; default: the reward
            model, if there is one and it is not memory-lean, else the policy with a head of zeros.
    """

    kl_coefficient: float = 0.04
    clip: float = 0.2
    value_clip: float = 0.15
    gamma: float = 1.0
    lam: float = 0.95
    minibatches: int = 4
    epochs: int = 1
    value_warmup: int = 50
    scale_rewards: bool = False
    pretraining_coefficient: float = 0.0
    pretraining_shards: str | None = None
    critic: str | None = None

    def __post_init__(self) -> None:
        check_range(
            self, kl_coefficient=(0.0, 1e3), clip=(1e-6, 1.0), value_clip=(1e-6, 1e6),
            gamma=(0.0, 1.0), lam=(0.0, 1.0), minibatches=(1, 1 << 16), epochs=(1, 1 << 10),
            value_warmup=(0, 1 << 40), pretraining_coefficient=(0.0, 1e6),
        )  # fmt: skip
        if self.pretraining_coefficient and not self.pretraining_shards:
            raise ValueError("pretraining_shards is missing, which the pretraining term needs")


@dataclass(frozen=True)
class PpoConfig:
    """A PPO run. With `lora`, reference and policy share one frozen base, and the critic is another
    adapter on it."""

    model: ModelOptions
    data: PromptOptions
    reward: RewardOptions
    optim: OptimOptions
    value_optim: OptimOptions
    run: RunOptions
    rollout: RolloutOptions = RolloutOptions()
    ppo: PpoOptions = PpoOptions()
    lora: LoraOptions | None = None


class PpoTrainer(RlTrainer):
    """Policy, critic and reference, and how a round of rollouts changes them."""

    def __init__(
        self,
        config: PpoConfig,
        policy: Qwen,
        critic: ScalarModel,
        reference: Qwen | None,
        prompts: Sequence[Prompt],
        judge: Judge,
        metrics: Metrics,
        pretraining: PackedText | None = None,
    ) -> None:
        """
        Args:
            config: the run.
            policy: with or without adapters.
            critic: values; in the memory-lean mode an adapter of the policy's trunk.
            reference: frozen; None = the policy's base without adapters.
            prompts: the queries.
            judge: gives rewards.
            metrics: where they go.
            pretraining: text for the pretraining term, if it is used.
        """
        super().__init__(
            policy, policy_parameters(policy, reference), prompts, judge, config.rollout,
            config.data, config.optim, config.run, metrics,
        )  # fmt: skip
        self.options = config.ppo
        self.value_optim = config.value_optim
        self.critic = critic.eval()
        self.reference = None if reference is None else reference.eval()
        self.pretraining = pretraining
        self.moments = RunningMoments()
        self.optimisers["critic"] = AdamW(critic.own_parameters(), config.value_optim)

    def update(self, experience: Experience, scores: Tensor) -> dict[str, float]:
        options, bounds = self.options, experience.boundaries
        reference = reference_log_probs(self.policy, self.reference, experience, self.limit)
        old_values = self._values(experience.samples)
        self.moments.update(scores)
        normalised = self.moments.normalised(scores, scale=options.scale_rewards)
        rewards = penalised_rewards(
            normalised, experience.old_log_probs, reference, bounds, options.kl_coefficient
        )
        advantages, returns = gae(rewards, old_values, bounds, options.gamma, options.lam)
        advantages = whitened(advantages)

        totals = {"loss": 0.0, "value_loss": 0.0, "clipped": 0.0, "values_clipped": 0.0}
        norms = {"gradient_norm": 0.0, "value_gradient_norm": 0.0}
        warming_up = self.step < options.value_warmup
        updates = options.minibatches * options.epochs
        for epoch in range(options.epochs):
            seed = self.run.seed * 1009 + self.step * 31 + epoch
            for groups in minibatches(experience, options.minibatches, self.limit, seed):
                count = sum(len(places) for _, places in groups)
                critic = self.optimisers["critic"]
                critic.accumulate()
                for samples, places in groups:
                    loss, clipped = clipped_value_loss(
                        target_values(self.critic, samples), old_values[places], returns[places],
                        options.value_clip,
                    )  # fmt: skip
                    (loss.sum() / count).backward()  # type: ignore[no-untyped-call]
                    totals["value_loss"] += float(loss.detach().mean()) * len(places) / count
                    totals["values_clipped"] += float(clipped.float().mean()) * len(places) / count
                norms["value_gradient_norm"] += critic.step(self.learning_rate(self.value_optim))
                if warming_up:
                    continue
                policy = self.optimisers["policy"]
                policy.accumulate()
                for samples, places in groups:
                    log_probs, _ = target_log_probs(self.policy, samples)
                    loss, clipped = clipped_policy_loss(
                        log_probs, experience.old_log_probs[places], advantages[places],
                        options.clip,
                    )  # fmt: skip
                    (loss.sum() / count).backward()  # type: ignore[no-untyped-call]
                    totals["loss"] += float(loss.detach().mean()) * len(places) / count
                    totals["clipped"] += float(clipped.float().mean()) * len(places) / count
                self._add_pretraining_gradient()
                norms["gradient_norm"] += policy.step(self.learning_rate(self.optim))
        variance = float(returns.var()) if len(returns) > 1 else 0.0
        unexplained = float((returns - old_values).var()) if len(returns) > 1 else 0.0
        return {
            **{name: value / updates for name, value in {**totals, **norms}.items()},
            "kl": float((experience.old_log_probs - reference).mean()),
            "kl_estimate": float(kl_estimate(experience.old_log_probs, reference).mean()),
            "running_reward": self.moments.mean,
            "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
            "value_only": float(warming_up),
        }

    @torch.no_grad()
    def _values(self, samples: Sequence[Sample]) -> Tensor:
        groups = micro_batches(samples, self.limit)[0]
        return torch.cat([target_values(self.critic, group) for group in groups])

    def _add_pretraining_gradient(self) -> None:
        """The pretraining term (Ouyang et al. 2022), on one sequence per update."""
        if self.pretraining is None:
            return
        [sample] = self.pretraining.step(self.optimisers["policy"].steps_done)
        batch = Batch.of([sample])
        loss = self.policy(batch.tokens, batch.positions, batch.cu_seqlens, targets=batch.targets)
        (self.options.pretraining_coefficient * loss / sample.counted).backward()

    def extra_state(self) -> dict[str, Any]:
        return {"moments": self.moments.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.moments.load_state_dict(state["moments"])


def policy_parameters(policy: Qwen, reference: Qwen | None) -> dict[str, nn.Parameter]:
    """What is trained: the adapter where the reference is the policy's own base, else all."""
    if reference is None:
        return {f"adapter.{i}": p for i, p in enumerate(adapter_parameters(policy))}
    return dict(policy.named_parameters())


@torch.no_grad()
def reference_log_probs(
    policy: Qwen, reference: Qwen | None, experience: Experience, limit: int
) -> Tensor:
    """The reference's log-probabilities of the responses' tokens, [tokens]."""
    if reference is not None:
        return flat_log_probs(reference, experience.samples, limit)
    with active_adapter(policy, None):
        return flat_log_probs(policy, experience.samples, limit)


def target_values(critic: ScalarModel, samples: Sequence[Sample]) -> Tensor:
    """The value before each of the responses' tokens was drawn, flat, [tokens] float32."""
    batch = Batch.of(samples)
    values: Tensor = critic(batch.tokens, batch.positions, batch.cu_seqlens)
    return values[batch.targets != IGNORE]


def open_critic(config: PpoConfig, policy: Qwen, say: Callable[[str], None]) -> ScalarModel:
    """The critic that the recipe says, on its own or as an adapter of the policy's trunk.

    Also adds the policy's adapter, which is the active one afterwards.
    """
    options, dtype = config.ppo, policy.embedding.weight.dtype
    if config.lora is not None:
        if config.lora.quantize is not None:
            lora.quantize_base(policy, config.lora.quantize)
        if options.critic is None:
            lora.add_adapter(policy, config.lora, CRITIC)
            critic = _beginner(ScalarModel(policy, CRITIC))
        else:
            folder = Path(options.critic)
            critic = ScalarModel.load(folder, shared=policy, adapter=CRITIC)
        adapters = dataclasses.replace(config.lora, quantize=None)
        lora.prepare_beside_reference(policy, adapters, say)
        return critic
    path = options.critic or config.reward.model
    if path is None:
        return _beginner(ScalarModel(copy_of(policy)))
    return ScalarModel.load(Path(path), dtype, config.model.kernels)


def _beginner(critic: ScalarModel) -> ScalarModel:
    """The critic with values of 0: random ones, far from any reward, would take long to unlearn."""
    nn.init.zeros_(critic.score)
    return critic


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    config, options = parse(
        PpoConfig, argv, "ppo", "Reinforcement learning from a reward model.", EXAMPLES
    )
    setup = set_up(config, resume=options.resume)
    policy, judge, metrics = setup.policy, setup.judge, setup.metrics
    reference = None if config.lora is not None else copy_of(policy).requires_grad_(False)
    critic = open_critic(config, policy, metrics.say)
    pretraining = None
    if config.ppo.pretraining_coefficient and config.ppo.pretraining_shards is not None:
        shards = Shards(Path(config.ppo.pretraining_shards))
        shards.check_tokenizer(judge.encoder.tokenizer)
        pretraining = PackedText(shards, config.data.context, 1, config.run.seed)
    trainer = PpoTrainer(
        config, policy, critic, reference, setup.prompts, judge, metrics, pretraining
    )
    models = [model for model in (policy, critic, reference, judge.model) if model is not None]
    run_trainer(config, options, trainer, models)
    saved = Path(config.run.folder) / "critic"
    if not options.estimate and not saved.exists():
        critic.save(saved, config.model.path or "")
        metrics.say(f"the critic is in {saved}")
    return 0
