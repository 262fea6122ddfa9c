"""What PPO and GRPO share: prompts, rewards, sampled experience, and the checks on it.

Models run in evaluation mode here, without dropout, also while they are trained: so the log-
probabilities of an unchanged policy are those that the engine reported while it sampled.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from qwen_native.nn import Qwen
from qwen_native.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from qwen_native.train.config import OptimOptions, RunOptions, as_dict, check_range
from qwen_native.train.data import Sample, micro_batches
from qwen_native.train.distributed import World
from qwen_native.train.lora import LoraOptions, rounding, save_policy
from qwen_native.train.metrics import Metrics
from qwen_native.train.optim import AdamW, learning_rate
from qwen_native.train.preference import ChatEncoder, answer_sample, shuffled, target_log_probs
from qwen_native.train.records import Report, expand, prompt_messages, read_objects
from qwen_native.train.rollout import NativePolicy, Response, Sampling
from qwen_native.train.scalar import ScalarModel
from qwen_native.train.session import Config, estimate, open_model, open_tokenizer, section
from qwen_native.train.trainer import model_flops

ALONE = World(0, 1, torch.device("cpu"), distributed=False)
"""Rollouts are the native engine's, in this process on the CPU."""

Record = Mapping[str, Any]
Verifier = Callable[[Record, str], float]


@section
@dataclass(frozen=True)
class PromptOptions:
    """The queries that are answered.

    Attributes:
        files: .jsonl, .json and .parquet with `prompt` (text or messages) or `messages` that end
            with the user's turn; other fields are for the verifier.
        context: most tokens of a query and its answer together.
        malformed: what to do about malformed records: report and "skip" them, or stop: "error".
    """

    files: tuple[str, ...]
    context: int = 2048
    malformed: Literal["skip", "error"] = "skip"

    def __post_init__(self) -> None:
        check_range(self, context=(2, 1 << 24))


@section
@dataclass(frozen=True)
class RolloutOptions:
    """How answers are sampled; the defaults are the report's where it has them.

    Attributes:
        n: answers to each query.
        max_new_tokens: most tokens of an answer.
        top_p: of the tokens that are drawn from.
        temperature: divides the logits that are drawn from.
        weights: of the engine: "f32", "bf16", "int8" or "int4"; default: the model's precision.
        log_probs: whose log-probabilities the policy is compared with when it is updated: those
            that the "engine" reported, or those that the "trainer" computes anew. They are equal in
            float32; see docs/NUMERICS.md for bf16.
        threads: of the engine; default: the CPUs that this process may use.
    """

    n: int = 2
    max_new_tokens: int = 256
    top_p: float = 0.9
    temperature: float = 1.0
    weights: Literal["f32", "bf16", "int8", "int4"] | None = None
    log_probs: Literal["engine", "trainer"] = "engine"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_range(
            self,
            n=(1, 256),
            threads=(1, 1024),
            max_new_tokens=(1, 1 << 20),
            top_p=(1e-6, 1.0),
            temperature=(1e-2, 100.0),
        )

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.top_p, self.temperature, self.n)


@section
@dataclass(frozen=True)
class RewardOptions:
    """Where rewards come from: one of the two.

    Attributes:
        model: folder of a reward model (`qwen-native train reward`).
        unfinished: the reward of an answer that was cut off before its end token; default: the one
            that it gets otherwise.
        verifier: "number", which compares the last number of an answer with the record's `answer`,
            or "file.py:function" with function(record, answer text) -> number.
    """

    model: str | None = None
    verifier: str | None = None
    unfinished: float | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.verifier is None):
            raise ValueError("reward needs either model or verifier")


@dataclass(frozen=True)
class Prompt:
    """A query: its token ids, and the record that it came from."""

    ids: list[int]
    record: Record


def read_prompts(
    files: Sequence[Path], encoder: ChatEncoder, longest: int, report: Report
) -> list[Prompt]:
    """Read and encode queries; those of more than `longest` tokens are rejected."""
    prompts = []
    for path in files:
        for where, record in read_objects(path, report):
            try:
                ids = encoder.prompt(prompt_messages(record))
            except ValueError as error:
                report.reject(where, str(error))
                continue
            if len(ids) > longest:
                report.reject(where, f"has {len(ids)} tokens, expected at most {longest}")
            else:
                prompts.append(Prompt(ids, record))
    return prompts


def load_verifier(name: str) -> Verifier:
    """The verifier that `RewardOptions.verifier` names.

    Raises:
        ValueError: there is none.
    """
    if name == "number":
        return number_verifier
    file, _, function = name.rpartition(":")
    path = Path(file)
    if not function or not path.is_file():
        raise ValueError(f"verifier is {name!r}, expected 'number' or 'file.py:function'")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"verifier is {name!r}, but {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"verifier is {name!r}, but {path} has no function {function}")
    verifier: Verifier = found
    return verifier


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number_verifier(record: Record, text: str) -> float:
    """1 when the last number of the text is the last one of the record's `answer`, else 0."""
    if "answer" not in record:
        raise ValueError("a record has no answer, which the verifier 'number' compares with")
    numbers = [_NUMBER.findall(str(part)) for part in (record["answer"], text)]
    if not numbers[0] or not numbers[1]:
        return 0.0
    expected, found = (float(part[-1].replace(",", "")) for part in numbers)
    return float(abs(expected - found) <= 1e-4)


class Judge:
    """Gives every response its reward, by a verifier or by a reward model."""

    def __init__(
        self,
        encoder: ChatEncoder,
        verifier: Verifier | None,
        model: ScalarModel | None,
        limit: int,
        unfinished: float | None = None,
    ) -> None:
        """
        Args:
            encoder: decodes the answers for the verifier.
            verifier: or None.
            model: or None.
            limit: most tokens that go through the reward model at once.
            unfinished: see `RewardOptions`.
        """
        self.encoder = encoder
        self.verifier = verifier
        self.model = model
        self.limit = limit
        self.unfinished = unfinished

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        """Rewards [responses], float32; `prompts` has one for each response."""
        rewards = self.rewards(prompts, responses)
        if self.unfinished is not None:
            cut = torch.tensor([r.finish_reason == "length" for r in responses])
            rewards = rewards.masked_fill(cut, self.unfinished)
        return rewards

    @torch.no_grad()
    def rewards(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> Tensor:
        """What verifier or reward model say."""
        if self.verifier is not None:
            values = []
            for prompt, response in zip(prompts, responses, strict=True):
                text = self.encoder.tokenizer.decode(response.tokens)
                value = float(self.verifier(prompt.record, text))
                if not math.isfinite(value):
                    raise ValueError(f"the verifier gave {value}, expected a finite number")
                values.append(value)
            return torch.tensor(values)
        assert self.model is not None
        samples = [answer_sample(r.prompt, r.tokens) for r in responses]
        groups = micro_batches(samples, self.limit)[0]
        return torch.cat([self.model.rewards(group) for group in groups]).cpu()


@dataclass
class Experience:
    """Sampled responses; per-token tensors are flat, [tokens], response after response.

    Attributes:
        responses: in the order of their prompts.
        samples: the same as the model takes them.
        boundaries: [responses + 1], where each begins in the flat tensors.
        old_log_probs: what ratios are formed with.
        metrics: of the sampling, among them how far engine and trainer are apart.
    """

    responses: list[Response]
    samples: list[Sample]
    boundaries: list[int]
    old_log_probs: Tensor
    metrics: dict[str, float]


def sample_experience(
    policy: Qwen,
    prompts: Sequence[Prompt],
    options: RolloutOptions,
    stop_ids: Sequence[int],
    context: int,
    seed: int,
    limit: int,
) -> Experience:
    """Sample responses with the native engine and compare its log-probabilities with torch's.

    Args:
        policy: whose weights the engine takes over.
        prompts: the queries.
        options: how to sample.
        stop_ids: tokens that end a response.
        context: most tokens of a prompt and its response.
        seed: of the draws.
        limit: most tokens that go through the torch model at once.
    """
    begin = time.perf_counter()
    room = len(prompts) * options.n * context
    engine = NativePolicy(
        policy,
        context=context,
        weights=options.weights,
        cache_tokens=room,
        threads=options.threads,
    )
    responses = engine.sample([p.ids for p in prompts], options.sampling, stop_ids, seed)
    seconds = time.perf_counter() - begin
    samples = [answer_sample(r.prompt, r.tokens) for r in responses]
    boundaries = [0]
    for response in responses:
        boundaries.append(boundaries[-1] + len(response.tokens))
    reported = torch.tensor([p for r in responses for p in r.log_probs])
    drawn = torch.tensor([p for r in responses for p in r.drawn_log_probs])
    with torch.no_grad():
        computed = flat_log_probs(policy, samples, limit)
    difference = (computed - reported).double()
    metrics = {
        "engine_max_difference": float(difference.abs().max()),
        "engine_mean_ratio": float(difference.exp().mean()),
        "rollout_tokens_per_second": len(reported) / seconds,
        "response_tokens": len(reported) / len(responses),
        "stopped": sum(r.finish_reason == "stop" for r in responses) / len(responses),
        "negative_log_prob": -float(reported.mean()),
        "drawn_negative_log_prob": -float(drawn.mean()),
    }
    old = reported if options.log_probs == "engine" else computed
    return Experience(responses, samples, boundaries, old, metrics)


def flat_log_probs(policy: Qwen, samples: Sequence[Sample], limit: int) -> Tensor:
    """Log-probabilities of all responses' tokens, flat, [tokens] float32."""
    groups = micro_batches(samples, limit)[0]
    return torch.cat([target_log_probs(policy, group)[0] for group in groups]).float().cpu()


def minibatches(
    experience: Experience, count: int, limit: int, seed: int
) -> Iterator[list[tuple[list[Sample], Tensor]]]:
    """Deal responses out at random to minibatches, each in groups of at most `limit` tokens.

    Yields:
        For each minibatch its groups: the samples, and [tokens] int64, where their tokens lie in
        the flat tensors.

    Raises:
        ValueError: there are more minibatches than responses.
    """
    if count > len(experience.samples):
        raise ValueError(
            f"minibatches is {count}, expected at most the {len(experience.samples)} answers of a "
            "step"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(experience.samples), generator=generator).tolist()
    bounds = experience.boundaries
    for part in range(count):
        groups: list[tuple[list[Sample], list[Tensor]]] = []
        size = 0
        for i in order[part::count]:
            length = len(experience.samples[i].tokens)
            if not groups or size + length > limit:
                groups.append(([], []))
                size = 0
            groups[-1][0].append(experience.samples[i])
            groups[-1][1].append(torch.arange(bounds[i], bounds[i + 1]))
            size += length
        yield [(samples, torch.cat(places)) for samples, places in groups]


def step_prompts(prompts: Sequence[Prompt], batch_size: int, seed: int, step: int) -> list[Prompt]:
    """The prompts of a step; every epoch goes through all of them in another order."""
    return [prompts[i] for i in shuffled(len(prompts), batch_size, seed, step)]


class RlConfig(Config, Protocol):
    """What the configurations of PPO and GRPO have."""

    @property
    def data(self) -> PromptOptions: ...

    @property
    def reward(self) -> RewardOptions: ...

    @property
    def rollout(self) -> RolloutOptions: ...

    @property
    def lora(self) -> LoraOptions | None: ...


@dataclass(frozen=True)
class Setup:
    """What PPO and GRPO begin with.

    Attributes:
        policy: the model, without adapters yet.
        prompts: the queries.
        judge: gives rewards.
        metrics: of the run.
    """

    policy: Qwen
    prompts: list[Prompt]
    judge: Judge
    metrics: Metrics


def set_up(config: RlConfig, *, resume: bool) -> Setup:
    """Read the queries, load policy and reward model.

    Raises:
        ValueError: the run's folder is in use, or the models do not fit together.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError("reinforcement learning runs on one process, but torchrun started it")
    if config.run.eval_every:
        raise ValueError(
            f"run.eval_every is {config.run.eval_every}, but there are no validation data here: "
            "every step reports its reward"
        )
    if config.model.dropout:
        raise ValueError(
            f"model.dropout is {config.model.dropout}, expected 0: with dropout the trainer's "
            "log-probabilities would not be the engine's"
        )
    folder = Path(config.run.folder)
    if not resume and checkpoints(folder):
        raise ValueError(f"{folder}: has checkpoints; give --resume or another run.folder")
    metrics = Metrics(folder, True, config.run.tensorboard)
    torch.manual_seed(config.run.seed)
    tokenizer, _ = open_tokenizer(config.model, folder, ALONE)
    encoder = ChatEncoder.of(config.model, tokenizer)
    report = Report(strict=config.data.malformed == "error")
    files = expand(config.data.files)
    longest = config.data.context - config.rollout.max_new_tokens
    prompts = read_prompts(files, encoder, longest, report)
    if report.malformed:
        metrics.say(report.summary())
    metrics.say(f"{len(prompts)} queries")
    convert = rounding(config.lora)
    policy = open_model(config.model, tokenizer, config.data.context, ALONE, convert)
    judge_model = None
    if config.reward.model is not None:
        dtype = policy.embedding.weight.dtype
        judge_model = ScalarModel.load(Path(config.reward.model), dtype, config.model.kernels)
        judge_model.eval().requires_grad_(False)
        if judge_model.trunk.config.vocab_size != policy.config.vocab_size:
            raise ValueError(
                f"the reward model has {judge_model.trunk.config.vocab_size} token ids, "
                f"the policy {policy.config.vocab_size}: expected the same vocabulary"
            )
    verifier = None if config.reward.verifier is None else load_verifier(config.reward.verifier)
    limit = config.run.micro_batch_tokens or config.data.context
    judge = Judge(encoder, verifier, judge_model, limit, config.reward.unfinished)
    return Setup(policy, prompts, judge, metrics)


def run_trainer(
    config: RlConfig, options: argparse.Namespace, trainer: RlTrainer, models: Sequence[nn.Module]
) -> None:
    """Estimate, train or resume, and write the policy into `run.folder`/model.

    Args:
        config: the recipe.
        options: of the command line.
        trainer: with everything in it.
        models: all that is in memory: policy, critic, reference, reward model.
    """
    metrics, folder = trainer.metrics, Path(config.run.folder)
    distinct = nn.ModuleList(models)
    estimate(
        distinct, trainer.policy.config, config, trainer.steps, trainer.context * config.rollout.n,
        trainer.limit, model_flops(trainer.policy, trainer.context), ALONE, metrics,
    )  # fmt: skip
    if options.estimate:
        return
    (folder / "config.json").write_text(json.dumps(as_dict(config), indent=2) + "\n")
    if options.resume:
        trainer.resume()
    else:
        metrics.restart()
    trainer.train()
    if not (folder / "model").exists():
        save_policy(trainer.policy, folder / "model", config.model.path or "")
    metrics.say(f"done: the policy is in {folder / 'model'}")


class RlTrainer:
    """The loop of reinforcement learning: sample, reward, update; metrics, checkpoints, resume.

    A step is one round of rollouts with its updates. All that is random in it follows from the
    run's seed and the step, so an interrupted run goes on as if it had not been.
    """

    def __init__(
        self,
        policy: Qwen,
        parameters: Mapping[str, nn.Parameter],
        prompts: Sequence[Prompt],
        judge: Judge,
        rollout: RolloutOptions,
        data: PromptOptions,
        optim: OptimOptions,
        run: RunOptions,
        metrics: Metrics,
    ) -> None:
        """
        Args:
            policy: what is trained.
            parameters: those of it that are, by name.
            prompts: the queries.
            judge: gives rewards.
            rollout: how answers are sampled.
            data: the context.
            optim: of the policy.
            run: the loop; `batch_size` is in queries.
            metrics: where they go.

        Raises:
            ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("there are no prompts to answer")
        self.policy = policy.eval()
        self.prompts = prompts
        self.judge = judge
        self.rollout = rollout
        self.context = data.context
        self.optim = optim
        self.run = run
        self.metrics = metrics
        self.limit = run.micro_batch_tokens or data.context
        self.steps = run.steps or -(-len(prompts) * run.epochs // run.batch_size)
        self.step = 0
        self.tokens = 0
        self.optimisers = {"policy": AdamW(parameters, optim)}

    def update(self, experience: Experience, scores: Tensor) -> dict[str, float]:
        """Learn from one round of rollouts with their rewards; `loss`, `gradient_norm` and more."""
        raise NotImplementedError

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the optimisers."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def train(self) -> None:
        """Do the remaining steps; the last one is always checkpointed."""
        with self.metrics.showing(self.steps, self.step):
            while self.step < self.steps:
                self._step()
                last = self.step == self.steps
                if last or (self.run.save_every and self.step % self.run.save_every == 0):
                    self.save()

    def _step(self) -> None:
        begin = time.perf_counter()
        queries = step_prompts(self.prompts, self.run.batch_size, self.run.seed, self.step)
        experience = sample_experience(
            self.policy, queries, self.rollout, self.judge.encoder.stop_ids, self.context,
            self.run.seed + self.step, self.limit,
        )  # fmt: skip
        each = [query for query in queries for _ in range(self.rollout.n)]
        scores = self.judge(each, experience.responses)
        torch.manual_seed(self.run.seed + self.step)
        values = self.update(experience, scores)
        self.step += 1
        tokens = sum(len(sample.tokens) for sample in experience.samples)
        self.tokens += tokens
        self.metrics.step(
            step=self.step,
            reward=float(scores.mean()),
            **values,
            **experience.metrics,
            tokens=self.tokens,
            tokens_per_second=tokens / (time.perf_counter() - begin),
        )
        self.metrics.say(
            f"step {self.step}/{self.steps}  reward {float(scores.mean()):.3f}  "
            f"KL {values['kl']:.4f}  engine and trainer: max |Δ| "
            f"{experience.metrics['engine_max_difference']:.1e}, mean ratio "
            f"{experience.metrics['engine_mean_ratio']:.7f}"
        )

    def learning_rate(self, optim: OptimOptions) -> float:
        """Of the present step."""
        return learning_rate(optim, self.step, self.steps)

    def save(self) -> None:
        """Write a checkpoint of the present state."""
        values = {
            "steps": self.steps,
            "batch_size": self.run.batch_size,
            "tokens": self.tokens,
            "updates": {name: o.steps_done for name, o in self.optimisers.items()},
            "extra": self.extra_state(),
        }
        folder = Path(self.run.folder)
        keep = self.run.keep_checkpoints
        save_checkpoint(folder, self.step, self._tensors(), values, ALONE, keep)

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run's folder.

        Raises:
            ValueError: there is none, or it does not fit.
        """
        found = checkpoints(Path(self.run.folder))
        if not found:
            raise ValueError(f"{self.run.folder}: has no checkpoint to resume from")
        values = load_checkpoint(found[-1][1], self._tensors(), ALONE)
        if values["steps"] != self.steps or values["batch_size"] != self.run.batch_size:
            raise ValueError(
                f"{found[-1][1]}: was made for {values['steps']} steps of batch size "
                f"{values['batch_size']}, not {self.steps} of {self.run.batch_size}"
            )
        self.step, self.tokens = values["step"], values["tokens"]
        for name, optimiser in self.optimisers.items():
            optimiser.restored(values["updates"][name])
        self.restore(values["extra"])
        self.metrics.rewind(self.step)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, optimiser in self.optimisers.items()
            for key, tensor in optimiser.tensors().items()
        }
