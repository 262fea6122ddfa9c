"""The torch model against transformers, the golden data and the native engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from model.tiny import make_checkpoint
from safetensors.torch import load_file
from tiny_models import save_gguf
from tolerance import assert_contraction
from transformers import AutoModelForCausalLM

from qwen_native import LLM
from qwen_native.config import ModelConfig
from qwen_native.nn import Qwen

KINDS = [
    ("qwen2", {"tie": True, "num_kv_heads": 1}),
    ("qwen2", {"yarn": True, "sliding_window": 24, "max_window_layers": 1}),
    ("qwen3", {"tie": True, "head_dim": 32}),
    ("qwen3", {"num_kv_heads": 6}),
]

TABLE_ERROR = 2e-5
"""Float32 angles of position 150 may differ by 150 ulp(1) / 2 = 9e-6 between two correct tables."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Fastest for models as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flat(*documents: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and cu_seqlens of some documents."""
    lengths = [len(document) for document in documents]
    positions = torch.cat([torch.arange(n) for n in lengths])
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return torch.tensor([t for document in documents for t in document]), positions, ends


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 331, count).tolist()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in root mean square."""
    return float((actual - expected).norm() / expected.norm())


def logits_of(model: Qwen, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(*flat(tokens)) @ model.head_weight.T


@pytest.mark.parametrize(("architecture", "changes"), KINDS)
def test_logits_and_gradients_match_transformers(tmp_path, architecture, changes):
    """In float64, so that only the tables of cos and sin, float32 in both, can differ."""
    theirs = make_checkpoint(tmp_path, architecture, **changes).double()
    ours = Qwen.load(tmp_path, torch.float64)
    documents = [ids(70), ids(45, seed=1)]
    total = 0.0
    for document in documents:
        out = theirs(torch.tensor([document]), labels=torch.tensor([document]))
        total += out.loss * (len(document) - 1)
        assert distance(logits_of(ours, document), out.logits[0].detach()) < TABLE_ERROR
    total.backward()

    targets = torch.tensor([t for d in documents for t in [*d[1:], -100]])
    ours(*flat(*documents), targets=targets).backward()
    gradients = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == gradients.keys()
    for name, parameter in ours.named_parameters():
        assert distance(parameter.grad, gradients[name].grad) < TABLE_ERROR, name


@pytest.mark.parametrize(("architecture", "changes"), KINDS)
def test_logits_match_the_engine(tmp_path, architecture, changes):
    theirs = make_checkpoint(tmp_path, architecture, **changes)
    check_against_engine(tmp_path, Qwen.load(tmp_path), ids(150))
    del theirs


GGUF_NAMES = {
    "qwen": {
        "token_embd": "transformer.wte", "output": "lm_head",
        "blk.1.attn_qkv": "transformer.h.1.attn.c_attn", "blk.1.ffn_norm": "transformer.h.1.ln_2",
        "blk.1.attn_output": "transformer.h.1.attn.c_proj",
        "blk.1.ffn_gate": "transformer.h.1.mlp.w2", "blk.1.ffn_up": "transformer.h.1.mlp.w1",
        "blk.1.ffn_down": "transformer.h.1.mlp.c_proj",
    },
    "qwen3": {
        "token_embd": "model.embed_tokens", "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
        "blk.0.attn_k_norm": "model.layers.0.self_attn.k_norm", "output_norm": "model.norm",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", ["qwen", "qwen3"])
def test_gguf_tensors_are_decoded_under_the_names_of_their_generation(tmp_path, architecture):
    path = tmp_path / "model.gguf"
    extra = {"qwen.seq_length": 512} if architecture == "qwen" else {}
    contents = save_gguf(path, architecture, metadata=extra)
    parameters = dict(Qwen.load(path).named_parameters())
    for name, ours in GGUF_NAMES[architecture].items():
        dtype, raw = contents[f"{name}.weight"]
        blocks = np.frombuffer(raw, dtype=np.uint8).reshape(
            parameters[f"{ours}.weight"].shape[0], -1
        )
        expected = dequantize(blocks, GGMLQuantizationType[dtype]).reshape(
            parameters[f"{ours}.weight"].shape
        )
        np.testing.assert_allclose(
            parameters[f"{ours}.weight"].detach().numpy(), expected, rtol=1e-6, err_msg=name
        )


@pytest.mark.parametrize(("architecture", "changes"), KINDS)
def test_native_kernels_give_the_logits_and_gradients_of_the_reference(
    tmp_path, architecture, changes
):
    make_checkpoint(tmp_path, architecture, **changes)
    batch = flat(ids(70), ids(45, seed=1))
    targets = torch.tensor(ids(115, seed=2))
    results = []
    for kernels, dtype in (
        ("native", torch.float32),
        ("reference", torch.float64),
        ("reference", torch.float32),
    ):
        model = Qwen.load(tmp_path, dtype, kernels)
        model(*batch, targets=targets).backward()
        with torch.no_grad():
            hidden = model(*batch)
        results.append([hidden, *(p.grad for p in model.parameters())])
    for native, exact, plain in zip(*results, strict=True):
        # Each of some twenty ops may be as far from float64 as NUMERICS.md allows gradients.
        assert_contraction(native, exact, plain, factor=6.0)


def check_against_engine(path: Path, model: Qwen, tokens: list[int]) -> None:
    """The engine's float32 may be as far from float64 as ours, four times for ~20 ops."""
    engine = torch.from_numpy(LLM(path, weights="f32").logits(tokens))
    base = logits_of(model.eval(), tokens)
    assert_contraction(engine, logits_of(model.double(), tokens), base, factor=4.0)


def test_qwen1_matches_the_golden_data_below_and_above_seq_length(golden):
    folder = golden / "qwen1-tiny"
    data = np.load(folder / "golden.npz")
    model = Qwen.load(folder)
    names = {name for name, _ in model.named_parameters()}
    assert names == load_file(folder / "model.safetensors").keys()
    lengths = [int(name.removeprefix("ids_")) for name in data if name.startswith("ids_")]
    for n in lengths:
        expected = torch.from_numpy(data[f"logits_{n}"])
        tokens = data[f"ids_{n}"].tolist()
        actual = logits_of(model.eval(), tokens)[-len(expected) :]
        assert (actual - expected).abs().max() <= 2e-4, n
        if n > model.config.seq_length:
            # Training never extends the context, as in the original.
            plain = logits_of(model.train(), tokens)[-len(expected) :]
            assert (plain - expected).abs().max() > 1e-2, n


def test_packed_documents_do_not_see_each_other(tmp_path):
    make_checkpoint(tmp_path, "qwen3")
    model = Qwen.load(tmp_path, torch.float64)
    first, second = ids(20), ids(33, seed=1)
    packed = model(*flat(first, second))
    alone = torch.cat([model(*flat(first)), model(*flat(second))])
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)


def test_activation_checkpointing_changes_no_bit(tmp_path):
    make_checkpoint(tmp_path, "qwen2")
    tokens = ids(40)
    gradients = []
    for switch in (False, True):
        model = Qwen.load(tmp_path)
        model.activation_checkpointing = switch
        model(*flat(tokens), targets=torch.tensor(tokens)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("architecture", "changes"), KINDS)
@pytest.mark.parametrize("from_scratch", [False, True], ids=["loaded", "new"])
def test_saved_folders_load_everywhere(tmp_path, architecture, changes, from_scratch):
    make_checkpoint(tmp_path / "source", architecture, **changes)
    model = Qwen.load(tmp_path / "source", torch.float32)
    if from_scratch:
        model.source = None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save(tmp_path / "saved")
    tokens = ids(100)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").double()
    expected = theirs(torch.tensor([tokens])).logits[0].detach()
    check_against_engine(tmp_path / "saved", model, tokens)
    assert distance(logits_of(model.double(), tokens), expected) < TABLE_ERROR
    with pytest.raises(ValueError, match="exists already"):
        model.save(tmp_path / "saved")


def test_qwen1_folder_survives_a_round_trip(golden, tmp_path):
    model = Qwen.load(golden / "qwen1-tiny")
    for source in (model.source, None):
        folder = tmp_path / str(source is None)
        model.source = source
        model.save(folder)
        again = Qwen.load(folder)
        assert again.config == model.config
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)


def test_bf16_parameters_keep_the_checkpoint_bit_for_bit(tmp_path):
    make_checkpoint(tmp_path, "qwen2", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    model = Qwen.load(tmp_path, torch.bfloat16)
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())


def test_initial_scale():
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="qwen2", hidden_size=128, intermediate_size=256, num_layers=8, num_heads=2,
        num_kv_heads=2, head_dim=64, vocab_size=300, rms_norm_eps=1e-6, rope_theta=1e4,
        rope_dim=64, max_position_embeddings=64, tie_word_embeddings=False, qkv_bias=True,
        qk_norm=False, sliding_window=None, max_window_layers=8, yarn=None,
        use_dynamic_ntk=False, use_logn_attn=False, seq_length=0,
    )  # fmt: skip
    state = Qwen(config).state_dict()
    assert abs(state["model.layers.3.mlp.up_proj.weight"].std() - 0.02) < 1e-3
    assert abs(state["model.layers.3.mlp.down_proj.weight"].std() - 0.005) < 2.5e-4
    assert not state["model.layers.3.self_attn.q_proj.bias"].any()
    assert (state["model.norm.weight"] == 1).all()


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="kernels is 'fast', expected one of native, reference"):
        Qwen.load(None, kernels="fast")
