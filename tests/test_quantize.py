"""Calibrated rounding on random matrices and on tiny checkpoints, against float64 formulas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model.tiny import logits, make_checkpoint

from qwen_native import _C, LLM, ops
from qwen_native.cli import main
from qwen_native.packed import PackedFile
from qwen_native.quantize import Reference, gptq_round, quantize


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened packed files leave their stamps in a cache folder of this test's own."""
    monkeypatch.setenv("QN_CACHE", str(tmp_path_factory.mktemp("cache")))


def correlated_inputs(rng: np.random.Generator, count: int, cols: int) -> np.ndarray:
    mix = np.eye(cols) + 0.3 * rng.standard_normal((cols, cols))
    inputs = (rng.standard_normal((count, cols)) @ mix).astype(np.float32)
    inputs[:, 3] *= 20  # an outlier channel
    return inputs


def output_error(packed: ops.PackedWeight, weight: np.ndarray, inputs: np.ndarray) -> float:
    difference = ops.unpack_weight(packed).astype(np.float64) - weight
    return float(np.linalg.norm(inputs @ difference.T) / np.linalg.norm(inputs @ weight.T))


def packed_directly(weight: np.ndarray) -> ops.PackedWeight:
    return ops.pack_weight(weight.reshape(-1).view(np.uint8), "F32", weight.shape, "int4")


@pytest.mark.parametrize("shape", [(40, 32), (75, 160), (33, 97), (64, 300)])
def test_gptq_lowers_the_error_of_the_outputs(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    weight = (0.05 * rng.standard_normal(shape)).astype(np.float32)
    inputs = correlated_inputs(rng, 2 * shape[1], shape[1])
    rounded = gptq_round(weight, inputs.T @ inputs)
    plain = packed_directly(weight)
    assert rounded.shape == shape and rounded.nbytes == plain.nbytes
    assert output_error(rounded, weight, inputs) < 0.75 * output_error(plain, weight, inputs)
    assert np.isfinite(ops.unpack_weight(rounded)).all()


def test_independent_inputs_leave_the_nearest_codes() -> None:
    weight = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    rounded = gptq_round(weight, np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(
        ops.unpack_weight(rounded), ops.unpack_weight(packed_directly(weight))
    )


@pytest.mark.parametrize("moments", [np.zeros((64, 64)), np.full((64, 64), np.nan)])
def test_inputs_that_say_nothing_leave_the_matrix_as_packed(moments: np.ndarray) -> None:
    weight = np.random.default_rng(1).standard_normal((40, 64)).astype(np.float32)
    rounded = gptq_round(weight, moments.astype(np.float32))
    np.testing.assert_array_equal(rounded.data, packed_directly(weight).data)


@pytest.mark.parametrize("isa", ops.available_isas())
def test_kernels_read_what_was_rounded(isa: str) -> None:
    """The greatest weight of each row, which the folded kernel needs, is stored anew."""
    rng = np.random.default_rng(2)
    weight = (0.05 * rng.standard_normal((70, 96))).astype(np.float32)
    inputs = correlated_inputs(rng, 200, 96)
    rounded = gptq_round(weight, inputs.T @ inputs)
    x = rng.standard_normal((40, 96)).astype(np.float32)
    expected = x.astype(np.float64) @ ops.unpack_weight(rounded).T
    before = _C.active_isa()
    try:
        ops.set_isa(isa)
        for invariant in (False, True):
            difference = ops.linear(x, rounded, invariant=invariant) - expected
            # NUMERICS.md: 0.5 % and, folded, 1.0 %.
            assert np.sqrt(np.mean(difference**2)) < 0.015 * expected.std()
    finally:
        ops.set_isa(before)


TAME = {"initializer_range": 0.06}  # so that rounding does not already change everything
TOKENS = [int(i) for i in np.random.default_rng(3).zipf(1.3, 4096) % 331]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("qwen2", {"tie": True, "yarn": True}),
    ("qwen3", {"sliding_window": 24, "max_window_layers": 1}),
]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_calibration_lowers_the_divergence(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    truth = make_checkpoint(tmp_path / "model", architecture, **options, **TAME)
    out = tmp_path / "out.qn"
    seen: list[str] = []
    receipt = quantize(
        tmp_path / "model",
        out,
        text=TOKENS,
        tokens=2048,
        progress=lambda what, done, total: seen.append(what),
    )
    held_out = np.array(TOKENS[3072:], np.int32).reshape(2, 512)
    source = LLM(tmp_path / "model", weights="f32", packed_cache=False)
    reference = Reference(source, held_out, None)
    plain = reference.compare(LLM(tmp_path / "model", weights="int4", packed_cache=False), None)
    assert receipt["mean_kl"] < 0.85 * plain.kl
    assert receipt["measured_positions"] == 512 and receipt["calibration_tokens"] == 2048
    assert {"measuring the source", "calibrating layers", "measuring the result"} <= set(seen)

    packed = LLM(out)
    assert packed.receipt == receipt == PackedFile(out).receipt
    # The receipt's own numbers from transformers' logits.
    divergence, flips = [], []
    for window in held_out.tolist():
        expected = torch.log_softmax(logits(truth, window)[256:].double(), -1)
        actual = torch.from_numpy(packed.logits(window, last=256)).double().log_softmax(-1)
        divergence.append((expected.exp() * (expected - actual)).sum(-1).mean())
        flips.append((expected.argmax(-1) != actual.argmax(-1)).double().mean())
    assert receipt["mean_kl"] == pytest.approx(float(np.mean(divergence)), rel=0.02, abs=1e-4)
    assert receipt["top1_flips"] == pytest.approx(float(np.mean(flips)), abs=0.01)


def test_the_budget_spends_eight_bits(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "qwen2", **TAME)
    options: dict[str, Any] = {"text": TOKENS, "tokens": 1024}
    free = quantize(tmp_path / "model", tmp_path / "free.qn", **options)
    budget = free["mean_kl"] / 3
    held = quantize(tmp_path / "model", tmp_path / "held.qn", kl_budget=budget, **options)
    assert held["mean_kl"] <= budget and held["matrices_at_8_bits"]
    assert held["bits_per_weight"] > free["bits_per_weight"]
    assert set(LLM(tmp_path / "held.qn").model.bytes_by_format) >= {"int4", "int8"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["free.qn", "held.qn", "model"]
    with pytest.raises(ValueError, match="with all matrices at 8 bits, expected at most"):
        quantize(tmp_path / "model", tmp_path / "none.qn", kl_budget=1e-9, **options)
    assert not (tmp_path / "none.qn").exists()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"out": "model.bin"}, "expected a name that ends in .qn"),
    ({"out": "missing/model.qn"}, "is not a folder"),
    ({"kl_budget": 0.0}, "kl_budget is 0.0, expected more than 0"),
    ({"tokens": 0}, "tokens is 0, expected at least 1"),
    ({"text": [1, 2, 3]}, "expected at least 512"),
    ({"text": [331] * 4096}, "token id 331 is not in the vocabulary of 331"),
    ({"text": None}, "has no tokenizer files"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "qwen2", **TAME)
    options: dict[str, Any] = {"out": "out.qn", "text": TOKENS} | changes
    out = tmp_path / options.pop("out")
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(tmp_path / "model", out, **options)


def test_the_command_and_info_show_the_receipt(tmp_path: Path, capsys: Any) -> None:
    make_checkpoint(tmp_path / "model", "qwen2", **TAME)
    out = tmp_path / "out.qn"
    receipt = quantize(tmp_path / "model", out, text=TOKENS, tokens=512)
    assert main(["info", "--model", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"mean_kl = {receipt['mean_kl']}" in shown
    assert "model.layers.2: q_proj" in shown and "lm_head: all" in shown
    assert main(["quantize", str(out), str(tmp_path / "again.qn")]) == 2
    assert "is packed already" in capsys.readouterr().err
