"""Training beside transformers: the same steps on the same model, machine and minutes.

    python benchmarks/train.py full --json

Every side runs in a process of its own, so that its memory can be told apart, and the sides take
turns for `--rounds` rounds. A step is forward, backward, clipping and AdamW on 1 x 1024 tokens of
Python's own sources in bfloat16. The peer has the settings that transformers' Trainer has by
default: fused AdamW on bfloat16 state, scaled-dot-product attention, no recomputation.

"lora" and "qlora" train adapters of rank 16 on all linear layers, the peer with PEFT on bfloat16
weights, ours on bfloat16 and on int4 ones. "ppo_rollout" samples two answers of 64 tokens to each
of 8 queries at top-p 0.9, ours with the hand-over of the weights to the native engine, the peer
with `generate`; the "loss" is the answers' mean -log p, which differs with what was drawn.

`speed_ratio` is the peer's median time over ours, `extra_memory_ratio` our peak memory beyond
weights, gradients and optimiser state over the peer's. Both losses are printed: they have to agree.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_native import _C
from qwen_native.train.process import prepare_process

TOKENS = 1024
RATE, CLIP = 1e-5, 1.0
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1


def text_ids(steps: int) -> Tensor:
    """Ids of real text, [steps, TOKENS + 1], int64."""
    from qwen_native.checkpoint import open_checkpoint
    from qwen_native.hub import resolve_model
    from qwen_native.packed_cache import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(resolve_model(None)))
    assert tokenizer is not None
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, typing, subprocess))
    ids = torch.tensor(tokenizer.encode(text)[: steps * (TOKENS + 1)])
    return ids.view(steps, TOKENS + 1)


@dataclass
class Side:
    """One side of a case: how to take a step, and what its memory is for.

    Attributes:
        step: takes ids [TOKENS + 1] and returns the loss.
        state: all weights, gradients and tensors of the optimiser, asked for after a step.
        phases: seconds by part of the latest step.
    """

    step: Callable[[Tensor], float]
    state: Callable[[], Iterable[Tensor]]
    phases: dict[str, float] = field(default_factory=dict)


class Clock:
    """Times the parts of a step."""

    def __init__(self, phases: dict[str, float]) -> None:
        self.phases = phases
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name] = now - self.last
        self.last = now


def training_side(
    loss_of: Callable[[Tensor], Tensor],
    update: Callable[[], object],
    state: Callable[[], Iterable[Tensor]],
) -> Side:
    """A step of forward, backward and `update`."""

    def step(ids: Tensor) -> float:
        clock = Clock(side.phases)
        loss = loss_of(ids)
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        update()
        clock.lap("optimiser")
        return float(loss.detach())

    side = Side(step, state)
    return side


def our_optimiser(model: Any) -> Any:
    from qwen_native.train.config import OptimOptions
    from qwen_native.train.optim import AdamW

    options = OptimOptions(
        RATE, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY, clip_norm=CLIP
    )
    return AdamW(dict(model.named_parameters()), options)


def our_side(model: Any, optimiser: Any, state: Callable[[], Iterable[Tensor]]) -> Side:
    positions, ends = torch.arange(TOKENS), torch.tensor([0, TOKENS], dtype=torch.int32)

    def loss_of(ids: Tensor) -> Tensor:
        loss: Tensor = model(ids[:-1], positions, ends, targets=ids[1:])
        return loss / TOKENS

    return training_side(loss_of, lambda: optimiser.step(RATE), state)


def peer_side(
    model: Any,
    trained: list[Tensor],
    optimiser: torch.optim.Optimizer,
    state: Callable[[], Iterable[Tensor]],
) -> Side:
    def loss_of(ids: Tensor) -> Tensor:
        # Its loss shifts the labels itself and drops the last one: give it one more token.
        loss: Tensor = model(input_ids=ids[None], labels=ids[None]).loss
        return loss

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimiser.step()
        optimiser.zero_grad()

    return training_side(loss_of, update, state)


def full_ours(folder: Path) -> Side:
    from qwen_native.nn import Qwen

    model = Qwen.load(None, torch.bfloat16, "native").train()
    optimiser = our_optimiser(model)

    def state() -> Iterable[Tensor]:
        # The optimiser forgets the gradients; they are as large as the parameters.
        parameters = list(model.parameters())
        return [*parameters, *parameters, *optimiser.tensors().values()]

    return our_side(model, optimiser, state)


def full_peer(folder: Path) -> Side:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
    model.config.use_cache = False
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, RATE, BETAS, EPS, fused=True)

    def state() -> Iterable[Tensor]:
        parameters = list(model.parameters())
        moments = [v for s in optimiser.state.values() for v in s.values()]
        return [*parameters, *parameters, *moments]

    return peer_side(model, list(model.parameters()), optimiser, state)


RANK = 16  # of LoRA, on all linear layers
QUERIES, ANSWERS, NEW_TOKENS = 8, 2, 64  # of a round of rollouts: 1024 tokens in all


def adapter_ours(quantize: str | None) -> Side:
    from qwen_native.nn import Qwen
    from qwen_native.train import lora

    model = Qwen.load(None, torch.bfloat16, "native")
    if quantize is not None:
        lora.quantize_base(model, quantize)
    lora.add_adapter(model, lora.LoraConfig(rank=RANK, alpha=RANK, dropout=0.0))
    model.train()
    optimiser = our_optimiser(model)

    def state() -> Iterable[Tensor]:
        adapters = lora.adapter_parameters(model)
        packed = [m.packed for m in model.modules() if isinstance(m, lora.QuantizedLinear)]
        codes = [torch.empty(weight.nbytes, dtype=torch.uint8, device="meta") for weight in packed]
        moments = [*optimiser.mean.values(), *optimiser.square.values()]
        return [*model.parameters(), *adapters, *codes, *moments]

    return our_side(model, optimiser, state)


def lora_ours(folder: Path) -> Side:
    return adapter_ours(None)


def qlora_ours(folder: Path) -> Side:
    return adapter_ours("int4")


def lora_peer(folder: Path) -> Side:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base.config.use_cache = False
    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, RATE, BETAS, EPS, WEIGHT_DECAY, fused=True)

    def state() -> Iterable[Tensor]:
        moments = [v for s in optimiser.state.values() for v in s.values()]
        return [*model.parameters(), *trained, *moments]

    return peer_side(model, trained, optimiser, state)


def rollout_ours(folder: Path) -> Side:
    """A round of PPO's rollouts with the hand-over of the weights; the "loss" is -log p."""
    from qwen_native.nn import Qwen
    from qwen_native.train.rollout import NativePolicy, Sampling

    model = Qwen.load(None, torch.bfloat16, "native")
    sampling = Sampling(NEW_TOKENS, top_p=0.9, n=ANSWERS)

    def step(ids: Tensor) -> float:
        clock = Clock(side.phases)
        queries = ids[:-1].view(QUERIES, -1).tolist()
        engine = NativePolicy(model, context=256, cache_tokens=16384, threads=_C.op_threads())
        clock.lap("hand-over")
        responses = engine.sample(queries, sampling, [], 0)
        clock.lap("sampling")
        assert sum(len(r.tokens) for r in responses) == TOKENS
        return -sum(p for r in responses for p in r.log_probs) / TOKENS

    side = Side(step, model.parameters)
    return side


def rollout_peer(folder: Path) -> Side:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.no_grad()
    def step(ids: Tensor) -> float:
        clock = Clock(side.phases)
        queries = ids[:-1].view(QUERIES, -1)
        done = model.generate(
            queries, attention_mask=torch.ones_like(queries), do_sample=True, top_p=0.9, top_k=0,
            temperature=1.0, repetition_penalty=1.0, num_return_sequences=ANSWERS,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        clock.lap("sampling")
        drawn = done.sequences[:, queries.shape[1] :]
        logits = torch.stack(done.logits, 1).float()
        assert drawn.numel() == TOKENS
        return -float(logits.log_softmax(-1).gather(2, drawn[..., None]).mean())

    side = Side(step, model.parameters)
    return side


CASES: dict[str, tuple[Callable[[Path], Side], Callable[[Path], Side]]] = {
    "full": (full_ours, full_peer),
    "lora": (lora_ours, lora_peer),
    "qlora": (qlora_ours, lora_peer),
    "ppo_rollout": (rollout_ours, rollout_peer),
}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted as often as it is listed."""
    return sum(t.numel() * t.element_size() for t in tensors)


def run_side(case: str, peer: bool, folder: Path, steps: int, threads: int) -> dict[str, Any]:
    """What one process measures: a step to warm up, then `steps` timed ones."""
    torch.set_num_threads(threads)
    ids = text_ids(steps + 1)
    if not peer:
        _C.set_op_threads(threads)
        prepare_process(torch.device("cpu"), "native", torch.bfloat16)
    before = resident_bytes()
    side = CASES[case][peer](folder)
    losses, seconds, phases = [], [], []
    for row in ids:
        begin = time.perf_counter()
        losses.append(side.step(row))
        seconds.append(time.perf_counter() - begin)
        phases.append(dict(side.phases))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "losses": losses,
        "seconds": seconds[1:],
        "phases": phases[1:],
        "extra_bytes": peak - before - bytes_of(side.state()),
        "peak_bytes": peak,
    }


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(case: str, rounds: int, steps: int, threads: int) -> dict[str, Any]:
    """Both sides in turn."""
    from qwen_native.nn import Qwen

    results: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        Qwen.load(None, torch.bfloat16).save(folder)
        for _ in range(rounds):
            for peer in (False, True):
                arguments = [case, "--side", "peer" if peer else "ours", "--folder", str(folder)]
                arguments += ["--steps", str(steps), "--threads", str(threads)]
                done = subprocess.run(
                    [sys.executable, __file__, *arguments], capture_output=True, text=True
                )
                if done.returncode != 0:
                    sys.exit(f"train.py: {arguments} failed:\n{done.stderr}")
                results[peer].append(json.loads(done.stdout))
    ours, theirs = results[False], results[True]
    mine, other = ([s for r in side for s in r["seconds"]] for side in (ours, theirs))
    extra, their_extra = (min(r["extra_bytes"] for r in side) for side in (ours, theirs))
    return {
        "case": case,
        "speed_ratio": statistics.median(other) / statistics.median(mine),
        "extra_memory_ratio": extra / their_extra,
        "tokens_per_second": TOKENS / statistics.median(mine),
        "peer_tokens_per_second": TOKENS / statistics.median(other),
        "extra_bytes": extra,
        "peer_extra_bytes": their_extra,
        "seconds": mine,
        "peer_seconds": other,
        "phases": median_phases(ours),
        "peer_phases": median_phases(theirs),
        "losses": ours[0]["losses"],
        "peer_losses": theirs[0]["losses"],
    }


def median_phases(runs: list[dict[str, Any]]) -> dict[str, float]:
    steps = [phases for run in runs for phases in run["phases"]]
    return {name: statistics.median(phases[name] for phases in steps) for name in steps[0]}


def describe(result: dict[str, Any]) -> str:
    lines = [
        f"{result['case']}: {result['tokens_per_second']:.0f} tokens/s beside"
        f" {result['peer_tokens_per_second']:.0f}, {result['speed_ratio']:.2f}x;"
        f" extra memory {result['extra_bytes'] / 1e9:.2f} GB beside"
        f" {result['peer_extra_bytes'] / 1e9:.2f} GB, {result['extra_memory_ratio']:.2f}x"
    ]
    for name in ("phases", "peer_phases"):
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in result[name].items())
        lines.append(f"  {name.replace('_', ' ')}: {parts}")
    for name in ("losses", "peer_losses"):
        lines.append(f"  {name.replace('_', ' ')}: " + " ".join(f"{x:.4f}" for x in result[name]))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--rounds", type=int, default=2, help="turns that each side gets")
    parser.add_argument("--steps", type=int, default=3, help="timed steps in a turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print a list of results, or write it"
    )
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    cases = options.cases or list(CASES)
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"case is {unknown[0]!r}, expected one of {', '.join(CASES)}")
    if options.side:
        peer = options.side == "peer"
        result = run_side(cases[0], peer, options.folder, options.steps, options.threads)
        print(json.dumps(result))
        return
    results = [measure(case, options.rounds, options.steps, options.threads) for case in cases]
    for result in results:
        print(describe(result), file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json:
        text = json.dumps(results, indent=1) + "\n"
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)


if __name__ == "__main__":
    main()
