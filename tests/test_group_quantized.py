"""GPTQ and AWQ folders against codes, scales and zero points that were packed bit by bit here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_hf
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_native import LLM, ops
from qwen_native.checkpoint import open_checkpoint
from qwen_native.errors import CheckpointError

SIZES = {"hidden_size": 128, "intermediate_size": 256}
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_words(values: np.ndarray, bits: int, order: list[int]) -> torch.Tensor:
    """[n, m] to [n, m * bits / 32]; order[i] is the value that the i-th field of a word holds."""
    per_word = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // per_word), np.uint32)
    for word in range(words.shape[1]):
        for field in range(per_word):
            column = values[:, word * per_word + order[field]].astype(np.uint32)
            words[:, word] |= column << np.uint32(field * bits)
    return torch.from_numpy(words.view(np.int32))


class Folder:
    """A tiny Qwen2 folder whose projections are quantised; `dense` are their true values."""

    def __init__(
        self,
        path: Path,
        method: str,
        *,
        bits: int = 4,
        group_size: int = 128,
        zero_points: bool = False,
        **config: Any,
    ) -> None:
        self.path = path
        state = save_hf(path, "qwen2", **SIZES)
        rng = np.random.default_rng(7)
        self.dense, self.parts = dict(state), dict(state)
        settings = {"quant_method": method, "bits": bits, "group_size": group_size} | config
        second = settings.get("checkpoint_format") == "gptq_v2"
        for name in [n for n in state if n.endswith("proj.weight")]:
            outputs, inputs = state[name].shape
            size = inputs if group_size == -1 else group_size
            groups = -(-inputs // size)
            codes = rng.integers(0, 1 << bits, (inputs, outputs))
            shape = (groups, outputs)
            zeros = (
                rng.integers(0, 1 << bits, shape) if zero_points else np.full(shape, 1 << bits - 1)
            )
            if bits == 8 and zero_points:
                zeros = np.clip(zeros, 128, 140)
                codes = np.clip(codes, 20, 255)
            scales = rng.uniform(0.01, 0.03, shape).astype(np.float16) / (1 << bits - 4)
            which = np.arange(inputs) // size
            weight = (codes - zeros[which]) * scales.astype(np.float64)[which]
            self.dense[name] = torch.from_numpy(weight.T.astype(np.float32))
            stem = name.removesuffix(".weight")
            plain = list(range(32 // bits))
            if method == "gptq":
                stored = zeros if second else (zeros - 1) % (1 << bits)
                parts = {
                    "qweight": pack_words(codes.T, bits, plain).T.contiguous(),
                    "qzeros": pack_words(stored, bits, plain),
                    "g_idx": torch.from_numpy(which.astype(np.int32)),
                }
                if not name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                    parts["bias"] = torch.zeros(outputs, dtype=torch.float16)
            else:
                parts = {
                    "qweight": pack_words(codes, bits, AWQ_COLUMNS),
                    "qzeros": pack_words(zeros, bits, AWQ_COLUMNS),
                }
            parts["scales"] = torch.from_numpy(scales)
            del self.parts[name]
            self.parts |= {f"{stem}.{part}": value for part, value in parts.items()}
        config_path = path / "config.json"
        self.config = json.loads(config_path.read_text()) | {"quantization_config": settings}
        self.save()

    def save(self) -> None:
        save_file(self.parts, self.path / "model.safetensors")
        (self.path / "config.json").write_text(json.dumps(self.config))


CASES = [
    ("gptq", {}),
    ("gptq", {"zero_points": True}),
    ("gptq", {"zero_points": True, "checkpoint_format": "gptq_v2"}),
    ("gptq", {"group_size": -1}),
    ("gptq", {"group_size": 32, "desc_act": False, "sym": True}),
    ("gptq", {"bits": 8}),
    ("gptq", {"bits": 8, "zero_points": True}),
    ("awq", {"version": "gemm"}),
    ("awq", {"version": "gemm", "zero_points": True, "zero_point": True}),
    ("awq", {"zero_points": True, "group_size": 64}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_weights_are_held_exactly(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = Folder(tmp_path, method, **options)
    tensors = open_checkpoint(tmp_path).tensors
    assert tensors.keys() == folder.dense.keys()
    symmetric = not options.get("zero_points") and options.get("bits", 4) == 4
    for name in [n for n in tensors if n.endswith("proj.weight")]:
        source = tensors[name]
        assert source.dtype == ("Q4_0" if symmetric else "Q8_0")
        packed = ops.pack_weight(
            source.data,
            source.dtype,
            source.shape,
            "int4_symmetric" if symmetric else "int8_grouped",
        )
        np.testing.assert_array_equal(ops.unpack_weight(packed), folder.dense[name].numpy())


@pytest.mark.parametrize(("method", "options"), [CASES[0], CASES[1], CASES[7], CASES[8]])
def test_logits_are_those_of_the_dequantised_model(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = Folder(tmp_path, method, **options)
    config = {k: v for k, v in folder.config.items() if k != "quantization_config"}
    truth = Qwen2ForCausalLM(Qwen2Config(**config)).eval()
    state = dict(folder.dense)
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    truth.load_state_dict(state)
    ids = [(7 * i + 3) % 80 for i in range(40)]
    with torch.no_grad():
        expected = truth(torch.tensor([ids])).logits[0].numpy()
    exact = LLM(tmp_path, weights="f32", packed_cache=False).logits(ids, last=40)
    spread = expected.std()
    assert np.abs(exact - expected).max() < 1e-4 * spread
    native = LLM(tmp_path, packed_cache=False)
    quantized = "int8_grouped" if options.get("zero_points") else "int4_symmetric"
    assert quantized in native.model.bytes_by_format
    # Activations are rounded to int8: about 0.5 % per product, over two layers.
    assert np.sqrt(np.mean((native.logits(ids, last=40) - expected) ** 2)) < 0.05 * spread


def test_zero_points_at_four_bits_lose_a_fraction_of_a_step(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "awq", zero_points=True)
    name = "model.layers.0.mlp.down_proj.weight"
    source = open_checkpoint(tmp_path).tensors[name]
    packed = ops.pack_weight(source.data, source.dtype, source.shape, "int4")
    error = ops.unpack_weight(packed) - folder.dense[name].numpy()
    # A step is 0.01 to 0.03. Rounding to sixteen levels afresh would cost 0.29 of a step.
    assert np.sqrt(np.mean(error**2)) < 0.08 * 0.02


def refused(folder: Folder, message: str) -> None:
    folder.save()
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_checkpoint(folder.path)


SETTINGS = [
    ("gptq", {"quant_method": "fp8"}, "quant_method is 'fp8', which is not supported"),
    ("gptq", {"bits": 3}, "bits is 3, expected 4 or 8 for gptq"),
    ("awq", {"bits": 8}, "bits is 8, expected 4 for awq"),
    ("awq", {"version": "gemv"}, "version is 'gemv', which is not supported"),
    ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    ("gptq", {"group_size": 100}, "group_size is 100, expected a multiple of 32"),
    ("gptq", {"group_size": 0}, "group_size is 0"),
    ("gptq", {"group_size": "128"}, "group_size is '128'"),
    ("gptq", {"bits": None}, "quantization_config.bits or w_bit is missing"),
]


@pytest.mark.parametrize(("method", "changes", "message"), SETTINGS)
def test_refuses_other_settings(
    method: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = Folder(tmp_path, method)
    folder.config["quantization_config"] |= changes
    refused(folder, message)


def test_refuses_a_config_that_is_no_object(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "gptq")
    folder.config["quantization_config"] = "gptq"
    refused(folder, "quantization_config is 'gptq', expected an object")


STEM = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_refuses_a_missing_part(part: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path, "gptq")
    del folder.parts[f"{STEM}.{part}"]
    refused(folder, f"tensor '{STEM}.{part}' is missing")


DAMAGE = [
    ("qweight", lambda t: t.float(), "has type F32, expected I32 or U32"),
    ("qweight", lambda t: t[:3].contiguous(), "has 24 inputs and 128 outputs"),
    ("qweight", lambda t: t[0].contiguous(), "expected two dimensions"),
    ("qzeros", lambda t: t[:1].contiguous(), "has shape (1, 16), expected (2, 16)"),
    ("scales", lambda t: t[:, :8].contiguous(), "has shape (2, 8), expected (2, 128)"),
    ("scales", lambda t: t.float() * 1.0001, "has a scale that fp16 does not hold exactly"),
    ("scales", lambda t: t / 0, "has a scale that fp16 does not hold exactly"),
    ("g_idx", lambda t: t.flip(0), "desc_act"),
    ("g_idx", lambda t: t[:5].contiguous(), "has shape (5,), expected (256,)"),
    ("bias", lambda t: t + 1, f"tensor '{STEM}.bias' is not part of"),
]


@pytest.mark.parametrize(("part", "damage", "message"), DAMAGE)
def test_refuses_a_damaged_part(part: str, damage: Any, message: str, tmp_path: Path) -> None:
    folder = Folder(tmp_path, "gptq")
    folder.parts[f"{STEM}.{part}"] = damage(folder.parts[f"{STEM}.{part}"])
    refused(folder, message)


def test_scales_in_bf16_are_taken_when_fp16_holds_them(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "gptq")
    for name in [n for n in folder.parts if n.endswith(".scales")]:
        folder.parts[name] = torch.full_like(folder.parts[name], 0.125).bfloat16()
    folder.save()
    source = open_checkpoint(tmp_path).tensors[f"{STEM}.weight"]
    values = ops.decode_source(source.data, source.dtype, source.shape)
    words = load_file(tmp_path / "model.safetensors")[f"{STEM}.qweight"].numpy().view(np.uint32)
    assert values[5, 9] == ((int(words[1, 5]) >> 4 & 15) - 8) * 0.125


def test_refuses_a_matrix_that_is_there_twice(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "gptq")
    folder.parts[f"{STEM}.weight"] = torch.zeros(128, 256)
    refused(folder, "has both a weight and a qweight")


def test_the_fused_projection_of_qwen1_is_split(golden: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((golden / "qwen1-tiny" / file).read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    stem = "transformer.h.1.attn.c_attn"
    outputs, inputs = state.pop(f"{stem}.weight").shape
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (inputs, outputs))
    groups = inputs // 32
    scales = rng.uniform(0.01, 0.03, (groups, outputs)).astype(np.float16)
    zeros = np.full((groups, outputs), 7)
    state |= {
        f"{stem}.qweight": pack_words(codes.T, 4, list(range(8))).T.contiguous(),
        f"{stem}.qzeros": pack_words(zeros, 4, list(range(8))),
        f"{stem}.scales": torch.from_numpy(scales),
    }
    save_file(state, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = ((codes - 8) * scales.astype(np.float32).repeat(32, axis=0)).T
    tensors = open_checkpoint(tmp_path).tensors
    for i, part in enumerate("qkv"):
        source = tensors[f"model.layers.1.self_attn.{part}_proj.weight"]
        values = ops.decode_source(source.data, source.dtype, (source.shape[0], source.shape[1]))
        rows = slice(i * outputs // 3, (i + 1) * outputs // 3)
        np.testing.assert_array_equal(values, expected[rows])
