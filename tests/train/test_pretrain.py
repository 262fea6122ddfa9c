"""`train pretrain` from the outside: it learns, survives kill -9 and runs on several processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sysconfig
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from train.tiny import command, environment, losses, run_command
from transformers import AutoModelForCausalLM

from qwen_native import LLM
from qwen_native.train.cli import main
from qwen_native.train.metrics import read_metrics

STDLIB = Path(sysconfig.get_path("stdlib"))

RECIPE = """
model:
  shape: {{hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 2}}
  tokenizer: bytes
  precision: fp32
data: {{context: 128, files: [{files}]}}
optim: {{learning_rate: 8e-3, warmup_steps: 10}}
run: {{folder: {folder}, steps: {steps}, batch_size: 8, micro_batch_tokens: 1024}}
"""


def recipe(folder: Path, files: list[Path], steps: int) -> Path:
    path = folder / "recipe.yaml"
    listed = ", ".join(str(file) for file in files)
    path.write_text(RECIPE.format(files=listed, folder=folder / "run", steps=steps))
    return path


def entropies(text: bytes) -> tuple[float, float]:
    """Of a byte, and of a byte given the one before, in nats, by their frequencies in the text."""
    bytes_, pairs, before = Counter(text), Counter(zip(text, text[1:], strict=False)), Counter(text)
    unigram = -sum(n / len(text) * math.log(n / len(text)) for n in bytes_.values())
    bigram = -sum(n / len(text) * math.log(n / before[a]) for (a, _), n in pairs.items())
    return unigram, bigram


def test_learns_real_text_beyond_its_bigrams(tmp_path, capfd):
    """Sources of the standard library: trained on some, measured on others.

    The entropies are those of the held-out text itself, which flatters them.
    """
    files = sorted(STDLIB.glob("encodings/cp*.py"))
    held_out = files[::10]
    path = recipe(tmp_path, [file for file in files if file not in held_out], steps=170)
    assert main(["pretrain", str(path), f"data.validation_files={held_out[0]}"]) == 0
    shown = capfd.readouterr().err
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    unigram, bigram = entropies(held_out[0].read_bytes())
    loss = next(line["validation_loss"] for line in lines if "validation_loss" in line)
    assert loss < bigram < unigram < lines[0]["loss"], (loss, bigram, unigram)
    assert "memory per process" in shown
    assert "matrix peak" in shown

    folder = tmp_path / "run" / "model"
    text = held_out[0].read_bytes()[:100]
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(torch.tensor([list(text)])).logits[0]
    engine = LLM(folder, weights="f32")
    assert engine.tokenizer.encode(text.decode()) == list(text)
    np.testing.assert_allclose(engine.logits(list(text)), expected, atol=2e-3)


def small(tmp_path: Path, name: str) -> list[str]:
    path = tmp_path / name
    path.mkdir()
    files = [STDLIB / "bisect.py", STDLIB / "heapq.py"]
    overrides = ["data.context=32", "run.save_every=2", "run.micro_batch_tokens=64"]
    return ["pretrain", str(recipe(path, files, steps=12)), *overrides]


def test_kill_9_and_resume_give_the_uninterrupted_losses(tmp_path):
    assert main(small(tmp_path, "a")) == 0
    killed = small(tmp_path, "b")
    process = subprocess.Popen(
        command(*killed), env=environment(), cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    metrics = tmp_path / "b" / "run" / "metrics.jsonl"
    try:
        for _ in range(6000):
            if metrics.exists() and metrics.read_text().count("\n") >= 5:
                break
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(read_metrics(metrics)) < 12, "it was finished before it could be killed"
    with metrics.open("a") as file:
        file.write('{"step": 99, "los')  # a line that the kill cut off
    assert main([*killed, "--resume"]) == 0
    assert losses(tmp_path / "b" / "run") == losses(tmp_path / "a" / "run")
    for name in ("model.safetensors", "config.json"):
        one, other = (tmp_path / run / "run" / "model" / name for run in "ab")
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "processes", [2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"]
)
def test_several_processes_follow_one(tmp_path, processes):
    """Sums in another order differ in float32 roundings, which Adam amplifies at first."""
    assert main(small(tmp_path, "one")) == 0
    many = small(tmp_path, "many")
    run_command(*many, processes=processes)
    one, other = losses(tmp_path / "one" / "run"), losses(tmp_path / "many" / "run")
    np.testing.assert_allclose(other, one, rtol=1e-3)
    assert one[-1] < one[0] - 0.5

    if processes > 2:
        return
    # What several processes saved, one goes on from.
    last = tmp_path / "many" / "run" / "checkpoints" / "step-00000012"
    last.rename(last.with_name(".lost"))
    (tmp_path / "many" / "run" / "model").rename(tmp_path / "model")
    assert main([*many, "--resume"]) == 0
    np.testing.assert_allclose(losses(tmp_path / "many" / "run"), one, rtol=1e-3)


def test_a_used_folder_is_not_overwritten(tmp_path):
    arguments = small(tmp_path, "a")
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="has a run already; give --resume or another run.folder"):
        main(["pretrain", *arguments[1:]])
