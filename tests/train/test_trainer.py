"""Equivalent configurations give the same trajectory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from train.tiny import ALONE, byte_tokenizer, losses, tiny_model, train

from qwen_native.train.config import OptimOptions, RunOptions
from qwen_native.train.data import Batch, PackedText
from qwen_native.train.metrics import Metrics, read_metrics
from qwen_native.train.records import Report
from qwen_native.train.shards import write_shards
from qwen_native.train.trainer import Trainer

CONTEXT = 32
# Two orders of summation differ by a few float32 roundings, which five steps of Adam amplify.
SAME = {"rtol": 2e-4}


@pytest.fixture
def source(tmp_path):
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    texts = [("test", f"{i} squared is {i * i}. " * (1 + i % 3)) for i in range(60)]
    shards = write_shards(tmp_path / "shards", texts, tokenizer, Report())
    packed = PackedText(shards, CONTEXT, 8, seed=1, validation=shards)
    packed.tokenizer = tokenizer
    return packed


def trajectory(folder, source, dtype=torch.float32, **options):
    kernels = options.pop("kernels", "reference")
    model = tiny_model(source.tokenizer, dtype, CONTEXT, kernels=kernels)
    model.activation_checkpointing = options.pop("recompute", False)
    train(folder, model, source, **options)
    return losses(folder)


def test_one_batch_of_8_is_4_of_2_is_8_of_1(tmp_path, source):
    whole = trajectory(tmp_path / "a", source, limit=8 * CONTEXT)
    np.testing.assert_allclose(trajectory(tmp_path / "b", source, limit=2 * CONTEXT), whole, **SAME)
    np.testing.assert_allclose(trajectory(tmp_path / "c", source, limit=1), whole, **SAME)
    assert whole[-1] < whole[0] - 0.2


def test_bf16_follows_fp32_in_any_split(tmp_path, source):
    exact = trajectory(tmp_path / "a", source)
    for name, limit in (("b", 8 * CONTEXT), ("c", CONTEXT)):
        rounded = trajectory(tmp_path / name, source, torch.bfloat16, limit=limit)
        # bf16 keeps 8 bits; the mean over 256 tokens is better than one of them.
        np.testing.assert_allclose(rounded, exact, rtol=2.0**-8)


def test_activation_checkpointing_changes_no_bit(tmp_path, source):
    plain = trajectory(tmp_path / "a", source)
    assert trajectory(tmp_path / "b", source, recompute=True) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_native_kernels_follow_the_reference_ops(tmp_path, source, dtype, recompute):
    """In bf16 the two round in different places, each as far from float32."""
    plain = trajectory(tmp_path / "a", source, dtype)
    native = trajectory(tmp_path / "b", source, dtype, kernels="native", recompute=recompute)
    rtol = 2e-4 if dtype == torch.float32 else 2.0**-8
    np.testing.assert_allclose(native, plain, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_is_uninterrupted_to_the_bit(tmp_path, source, dtype):
    """With dropout, so that the random numbers count, too."""

    def run(folder, **options):
        model = tiny_model(source.tokenizer, dtype, CONTEXT)
        model.dropout = 0.1
        torch.manual_seed(5)
        train(folder, model, source, steps=8, save_every=3, **options)
        return model

    straight = run(tmp_path / "a")
    run(tmp_path / "b")
    # Without the last checkpoint it looks as if the machine had stopped after step 8.
    last = tmp_path / "b" / "checkpoints" / "step-00000008"
    last.rename(last.with_name(".lost"))
    resumed = run(tmp_path / "b", resume=True)
    assert losses(tmp_path / "b") == losses(tmp_path / "a")
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loss_is_the_mean_over_counted_tokens(tmp_path, source):
    model = tiny_model(source.tokenizer, context=CONTEXT)
    batch = Batch.of(source.step(0))
    with torch.no_grad():
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens)
        logits = hidden @ model.head_weight.T
    expected = torch.nn.functional.cross_entropy(logits, batch.targets)
    train(tmp_path / "run", model, source, steps=1)
    assert losses(tmp_path / "run")[0] == pytest.approx(expected.item(), rel=1e-6)


def test_validation_loss_is_reported_at_the_end(tmp_path, source):
    trainer = train(tmp_path, tiny_model(source.tokenizer, context=CONTEXT), source, eval_every=2)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    found = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    assert list(found) == [0, 2, 4, 5]
    assert found[0] > found[5]
    total = counted = 0
    trainer.model.eval()
    for sample in source.validation():
        with torch.no_grad():
            total += trainer.loss_sum([sample]).item()
        counted += sample.counted
    assert found[5] == pytest.approx(total / counted, rel=1e-5)


def test_a_run_does_not_resume_into_another_plan(tmp_path, source):
    train(tmp_path, tiny_model(source.tokenizer, context=CONTEXT), source, steps=2)
    model = tiny_model(source.tokenizer, context=CONTEXT)
    with pytest.raises(ValueError, match="was made for 2 steps of batch size 8, not 3 of 8"):
        train(tmp_path, model, source, steps=3, resume=True)
    other = PackedText(source.stream.shards, CONTEXT, 8, seed=2)
    with pytest.raises(ValueError, match="the data that come next are not those of the run"):
        train(tmp_path, model, other, steps=2, resume=True)
    with pytest.raises(ValueError, match="has no checkpoint"):
        train(tmp_path / "none", model, source, resume=True)


def test_an_empty_share_contributes_nothing(tmp_path, source):
    model = tiny_model(source.tokenizer, context=CONTEXT)
    run = RunOptions(folder=str(tmp_path))
    metrics = Metrics(tmp_path, is_main=False)
    trainer = Trainer(model, source, OptimOptions(learning_rate=1.0), run, ALONE, 1, 1, metrics)
    loss = trainer.loss_sum([])
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters())
