"""Whole checkpoints: folders that transformers saves, GGUF files of the gguf package, damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from demo_model import demo_path
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated, opens_or_refuses
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import GGUF_HIDDEN, GGUF_INTER, save_gguf, save_hf

from qwen_native.checkpoint import Checkpoint, open_checkpoint
from qwen_native.errors import CheckpointError
from qwen_native.tensor_names import expected_shapes


def assert_same(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in checkpoint.tensors.items():
        assert tensor.name == name and tensor.dtype == "F32"
        values = tensor.data.view("<f4").reshape(tensor.shape)
        np.testing.assert_array_equal(values, state[name].numpy())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_opens_what_transformers_saves(kind: str, shard: str, tied: bool, tmp_path: Path) -> None:
    state = save_hf(tmp_path, kind, shard, tie_word_embeddings=tied)
    assert (tmp_path / "model.safetensors").exists() == (shard == "5GB")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.kind == "hf" and checkpoint.path == tmp_path
    assert checkpoint.config.architecture == kind
    assert checkpoint.config.tie_word_embeddings is tied
    assert checkpoint.metadata == json.loads((tmp_path / "config.json").read_text())
    assert_same(checkpoint, state)


def test_opens_the_golden_qwen(golden: Path) -> None:
    folder = golden / "qwen1-tiny"
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.architecture == "qwen"
    assert checkpoint.tensors.keys() == expected_shapes(checkpoint.config).keys()
    with safe_open(folder / "model.safetensors", "np") as truth:

        def check(canonical: str, expected: np.ndarray) -> None:
            tensor = checkpoint.tensors[canonical]
            values = tensor.data.view("<f4").reshape(tensor.shape)
            np.testing.assert_array_equal(values, expected)

        check("model.embed_tokens.weight", truth.get_tensor("transformer.wte.weight"))
        check("lm_head.weight", truth.get_tensor("lm_head.weight"))
        check("model.norm.weight", truth.get_tensor("transformer.ln_f.weight"))
        for i in range(4):
            theirs, ours = f"transformer.h.{i}.", f"model.layers.{i}."
            for kind in ("weight", "bias"):
                fused = truth.get_tensor(f"{theirs}attn.c_attn.{kind}")
                for j, part in enumerate("qkv"):
                    rows = fused[128 * j : 128 * (j + 1)]
                    check(f"{ours}self_attn.{part}_proj.{kind}", rows)
            check(f"{ours}self_attn.o_proj.weight", truth.get_tensor(f"{theirs}attn.c_proj.weight"))
            check(f"{ours}mlp.up_proj.weight", truth.get_tensor(f"{theirs}mlp.w1.weight"))
            check(f"{ours}mlp.gate_proj.weight", truth.get_tensor(f"{theirs}mlp.w2.weight"))
            check(f"{ours}mlp.down_proj.weight", truth.get_tensor(f"{theirs}mlp.c_proj.weight"))
            check(f"{ours}input_layernorm.weight", truth.get_tensor(f"{theirs}ln_1.weight"))
            second = truth.get_tensor(f"{theirs}ln_2.weight")
            check(f"{ours}post_attention_layernorm.weight", second)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_opens_gguf(architecture: str, tied: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    contents = save_gguf(path, architecture, tied=tied)
    checkpoint = open_checkpoint(path)
    assert checkpoint.kind == "gguf" and checkpoint.path == path
    assert checkpoint.config.tie_word_embeddings is tied
    assert checkpoint.tensors.keys() == expected_shapes(checkpoint.config).keys()
    renamed = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.1.attn_k.weight": "model.layers.1.self_attn.k_proj.weight",
        "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for theirs, ours in renamed.items():
        tensor = checkpoint.tensors[ours]
        assert (tensor.dtype, tensor.data.tobytes()) == contents[theirs]
    assert checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].shape == (
        GGUF_HIDDEN,
        GGUF_INTER,
    )


def test_opens_gguf_qwen(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    contents = save_gguf(path, "qwen", layers=5)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.intermediate_size == GGUF_INTER
    fused_types = set()
    for i in range(5):
        for kind in ("weight", "bias"):
            dtype, raw = contents[f"blk.{i}.attn_qkv.{kind}"]
            fused_types.add(dtype)
            names = [f"model.layers.{i}.self_attn.{p}_proj.{kind}" for p in "qkv"]
            parts = [checkpoint.tensors[name] for name in names]
            assert b"".join(part.data.tobytes() for part in parts) == raw
            assert {part.dtype for part in parts} == {dtype}
            assert {part.shape[0] for part in parts} == {GGUF_HIDDEN}
    assert len(fused_types) > 3


def test_opens_the_demo_model(demo: Path) -> None:
    checkpoint = open_checkpoint(demo)
    config = checkpoint.config
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (896, 24, 151936)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (14, 2, 64)
    assert not config.tie_word_embeddings  # the file stores the output matrix in another type
    assert checkpoint.generation_config["eos_token_id"] == [151645, 151643]
    assert checkpoint.generation_config["pad_token_id"] == 151643
    assert "<|im_start|>" in (checkpoint.chat_template or "")
    assert len(checkpoint.metadata["tokenizer.ggml.tokens"]) == 151936
    for name, tensor in checkpoint.tensors.items():
        if len(tensor.shape) == 2:
            rows = tensor.rows(0, 16, name)
            raw = rows.data.reshape(16, -1)
            values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.dtype])
            # Read from a wrong place or as a wrong type, scales of float16 would be wild.
            assert values.shape == rows.shape and 1e-3 < values.std() < 1, name


@pytest.fixture(scope="session")
def demo() -> Path:
    return demo_path()


def resident_bytes(path: Path) -> int:
    """Resident part of this process's maps of a file, in bytes."""
    total, counting = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            counting = line.endswith(str(path))
        elif counting and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_release_drops_resident_pages(tmp_path: Path) -> None:
    save_hf(tmp_path, "qwen2", vocab_size=8192, tie_word_embeddings=False)
    checkpoint = open_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    before = {name: int(t.data.sum()) for name, t in checkpoint.tensors.items()}
    full = resident_bytes(path)
    head = checkpoint.tensors["lm_head.weight"]
    checkpoint.release(head)
    assert full - resident_bytes(path) >= head.data.nbytes - 2 * 4096
    for tensor in checkpoint.tensors.values():
        checkpoint.release(tensor)
    assert resident_bytes(path) <= full / 4
    assert {name: int(t.data.sum()) for name, t in checkpoint.tensors.items()} == before


def test_an_equal_copy_of_a_tied_matrix_is_dropped(tmp_path: Path) -> None:
    state = save_hf(tmp_path, "qwen2", tie_word_embeddings=True)
    head = state["model.embed_tokens.weight"].clone()
    save_file(state | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_word_embeddings
    assert_same(checkpoint, state)


def test_a_different_copy_of_a_tied_matrix_unties(tmp_path: Path) -> None:
    state = save_hf(tmp_path, "qwen2", tie_word_embeddings=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.tie_word_embeddings
    assert_same(checkpoint, state)


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_generation_config(tmp_path: Path) -> None:
    save_hf(tmp_path, "qwen2")
    put(tmp_path, "generation_config.json", {"eos_token_id": [5, 7], "top_p": 0.8, "top_k": 20})
    expected = {"eos_token_id": [5, 7], "top_p": 0.8, "top_k": 20}
    assert open_checkpoint(tmp_path).generation_config == expected
    put(tmp_path, "generation_config.json", {"eos_token_id": 5})
    assert open_checkpoint(tmp_path).generation_config == {"eos_token_id": [5]}
    put(tmp_path, "generation_config.json", {"eos_token_id": None})
    assert open_checkpoint(tmp_path).generation_config == {}
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    put(tmp_path, "config.json", config | {"eos_token_id": 9, "bos_token_id": 3})
    generation_config = open_checkpoint(tmp_path).generation_config
    assert generation_config["eos_token_id"] == [9]
    assert generation_config["bos_token_id"] == 3
    for bad in ("x", [1, "x"], -1, [True], 1 << 40):
        put(tmp_path, "generation_config.json", {"eos_token_id": bad})
        with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id is"):
            open_checkpoint(tmp_path)


def test_gguf_generation_config(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    metadata = {
        "tokenizer.ggml.tokens": ["a", "b", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "c"],
        "tokenizer.ggml.token_type": [1, 1, 3, 3, 3, 1],
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.penalty_repeat": 1.125,
    }
    save_gguf(path, "qwen2", metadata=metadata)
    checkpoint = open_checkpoint(path)
    assert checkpoint.generation_config == {
        "bos_token_id": 2,
        "pad_token_id": 2,
        "eos_token_id": [4, 2],
        "temperature": 0.5,
        "top_k": 20,
        "repetition_penalty": 1.125,
    }
    assert checkpoint.chat_template == "{{ messages }}"
    # A text that only looks like an end token is not one.
    save_gguf(path, "qwen2", metadata=metadata | {"tokenizer.ggml.token_type": [1] * 6})
    assert open_checkpoint(path).generation_config["eos_token_id"] == [4]


def test_chat_template(tmp_path: Path) -> None:
    save_hf(tmp_path, "qwen2")
    assert open_checkpoint(tmp_path).chat_template is None
    put(tmp_path, "tokenizer_config.json", {"chat_template": "one"})
    assert open_checkpoint(tmp_path).chat_template == "one"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "two"}]
    put(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert open_checkpoint(tmp_path).chat_template == "two"
    put(tmp_path, "tokenizer_config.json", {"chat_template": 7})
    with pytest.raises(CheckpointError, match="chat_template is 7"):
        open_checkpoint(tmp_path)
    put(tmp_path, "chat_template.jinja", "three é")
    assert open_checkpoint(tmp_path).chat_template == "three é"


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def only_gguf(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    save_gguf(folder / "m.gguf", "qwen2")


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def config_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        put(folder, "config.json", config | changes)

    return change


def change_tensor(name: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state.pop(name, None)
        if value is not None:
            state[name] = value
        save_file(state, folder / "model.safetensors")

    return change


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (no_config, "has no config.json"),
    "only a GGUF file": (only_gguf, "m.gguf"),
    "only a pickle": (only_pickle, "only PyTorch pickles"),
    "no weights": (no_weights, "has neither model.safetensors"),
    "config is a folder": (config_is_a_folder, "not a regular file"),
    "config is not JSON": (lambda f: put(f, "config.json", "{"), "not valid JSON"),
    "config is a list": (lambda f: put(f, "config.json", []), "expected an object"),
    "other model": (change_config(model_type="llama"), "model_type is 'llama'"),
    "more layers": (
        change_config(num_hidden_layers=3, layer_types=None),
        "'model.layers.2.input_layernorm.weight'",
    ),
    "fewer layers": (
        change_config(num_hidden_layers=1, layer_types=None),
        "is not part of a qwen2 model with 1",
    ),
    "other vocabulary": (
        change_config(vocab_size=81),
        "'model.embed_tokens.weight' has shape (80, 64), expected (81, 64)",
    ),
    "untied without head": (
        change_config(tie_word_embeddings=False),
        "'lm_head.weight' is missing",
    ),
    "missing tensor": (change_tensor("model.norm.weight", None), "'model.norm.weight' is missing"),
    "int tensor": (
        change_tensor("model.norm.weight", torch.ones(64, dtype=torch.int32)),
        "'model.norm.weight' has type I32",
    ),
    "extra tensor": (change_tensor("visual.weight", torch.ones(3)), "'visual.weight' is not part"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_refuses_folder(name: str, tmp_path: Path) -> None:
    save_hf(tmp_path, "qwen2", tie_word_embeddings=True)
    damage, message = DAMAGE[name]
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refuses_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "missing")
    for name in ("x" * 5000, "nul\0"):
        with pytest.raises(CheckpointError, match="does not exist"):
            open_checkpoint(name)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="expected a model folder or a .gguf file"):
        open_checkpoint(tmp_path / "model.bin")


BAD_GGUF: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"changes": {"token_embd.weight": None}}, "'token_embd.weight' is missing"),
    ("qwen2", {"changes": {"blk.1.attn_q.bias": None}}, "'blk.1.attn_q.bias' (model.layers.1.self"),
    ("qwen3", {"changes": {"blk.0.attn_q_norm.weight": None}}, "'blk.0.attn_q_norm.weight' (model"),
    ("qwen3", {"changes": {"blk.0.attn_q.bias": (256,)}}, "'blk.0.attn_q.bias' is not part of a"),
    ("qwen2", {"changes": {"rope_freqs.weight": (32,)}}, "'rope_freqs.weight' is not part of"),
    ("qwen", {"changes": {"blk.0.attn_qkv.weight": (512, 256)}}, "has shape (512, 256), expected"),
    ("qwen2", {"changes": {"blk.0.ffn_up.weight": (256, 512)}}, "(256, 512), expected (512, 256)"),
    ("qwen2", {"metadata": {"split.count": 2}}, "one of 2 parts"),
    ("qwen2", {"metadata": {"split.count": "x"}}, "split.count is 'x'"),
    ("qwen2", {"metadata": {"tokenizer.chat_template": 7}}, "chat_template is 7"),
    ("qwen2", {"metadata": {"tokenizer.ggml.eos_token_id": "x"}}, "eos_token_id is 'x'"),
    ("qwen2", {"metadata": {"general.sampling.temp": "x"}}, "temp is 'x'"),
    ("llama", {}, "general.architecture is 'llama'"),
]


@pytest.mark.parametrize(("architecture", "options", "message"), BAD_GGUF)
def test_refuses_gguf(
    architecture: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_gguf(tmp_path / "a.gguf", architecture, **options)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "a.gguf")
    assert message in str(error.value)
    assert str(tmp_path / "a.gguf") in str(error.value)


def test_fuzzed_gguf_models_give_clean_errors(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 3]}
    path = tmp_path / "a.gguf"
    save_gguf(path, "qwen2", layers=1, metadata=metadata)
    data = path.read_bytes()
    header_bytes = min(int(t.data_offset) for t in GGUFReader(path).tensors)

    @settings(max_examples=1000, derandomize=True, deadline=2000, database=None)
    @given(mutated(data[:header_bytes], header_bytes))
    def check(damaged: bytes) -> None:
        opens_or_refuses(path, damaged + data[header_bytes:], open_checkpoint)

    check()


def test_fuzzed_folders_give_clean_errors(tmp_path: Path) -> None:
    save_hf(tmp_path / "good", "qwen2")
    put(tmp_path / "good", "tokenizer_config.json", {"chat_template": "x"})
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    files = {
        name: (tmp_path / "good" / name).read_bytes()
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    }

    @settings(max_examples=500, derandomize=True, deadline=2000, database=None)
    @given(st.data(), st.sampled_from(sorted(files)))
    def check(data: st.DataObject, name: str) -> None:
        damaged = data.draw(mutated(files[name], len(files[name])))
        path = tmp_path / "bad" / name
        opens_or_refuses(path, damaged, lambda path: open_checkpoint(path.parent))
        path.write_bytes(files[name])

    check()
