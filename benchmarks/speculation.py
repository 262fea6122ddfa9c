"""Prompt-lookup speculation beside plain decoding: the same weights, prompts and minutes.

    python benchmarks/speculation.py --weights int4

Two answers of the model, with and without speculation in turn: to a request to edit a function,
whose answer repeats most of the prompt, and a sampled story, which repeats nothing. Times are those
of decoding, from the first token on. The tokens have to be the same with and without; the
exit status is 1 where they are not, or where a ratio is below the goal.
"""

from __future__ import annotations

import argparse
import heapq
import inspect
import os
import statistics
import sys
from typing import Any

from harness import store

from qwen_native import LLM

EDIT = (
    "Rename the variable `h_append` to `push` in this function, change nothing else, and give back "
    f"the whole function:\n\n```python\n{inspect.getsource(heapq.merge)}```"
)
STORY = "Write a long story about a lighthouse keeper who has never seen the sea."
CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "edit of a function, greedy": (EDIT, {"temperature": 0.0}, 1.5),
    "story, temperature 1": (
        STORY,
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1},
        0.97,
    ),
}


def main() -> int:
    """Measure, print the table, return 1 when a ratio is below the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder, .gguf file or id; default: the demo model")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=256, help="length of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    engines = {
        mode: LLM(options.model, weights=options.weights, threads=options.threads, speculation=mode)
        for mode in ("off", "prompt_lookup")
    }

    print(f"{options.weights}, {options.threads} threads, {options.tokens} tokens, medians")
    print(f"{'tokens per second':30}{'plain':>9}{'lookup':>9}{'ratio':>8}{'goal':>7}")
    record, failed = {}, False
    for name, (prompt, sampling, goal) in CASES.items():
        messages = [{"role": "user", "content": prompt}]
        speed: dict[str, list[float]] = {mode: [] for mode in engines}
        answers = {}
        for run in range(options.rounds + 1):
            for mode, llm in engines.items():
                answer = llm.chat(
                    messages, max_new_tokens=options.tokens, ignore_eos=True, **sampling
                )
                answers[mode] = answer.token_ids
                if run > 0:  # the first run warms up
                    speed[mode].append(answer.timings.decode_tokens_per_second)
        ratio = statistics.median(
            lookup / plain
            for plain, lookup in zip(speed["off"], speed["prompt_lookup"], strict=True)
        )
        plain, lookup = (statistics.median(rates) for rates in speed.values())
        print(f"{name:30}{plain:9.1f}{lookup:9.1f}{ratio:7.2f}x{goal:6.2f}x")
        if answers["off"] != answers["prompt_lookup"]:
            print(f"{name}: the answers differ")
            failed = True
        failed = failed or ratio < goal
        record[name] = {"tokens_per_second": speed, "ratio": ratio, "goal": goal}
    if options.json:
        store(f"speculation-{options.weights}", {"options": vars(options), "cases": record})
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
