"""qwen_native/train/scalar.py: rewards at the end token, files, adapters."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch

from qwen_native.errors import CheckpointError
from qwen_native.train import lora
from qwen_native.train.preference import answer_sample, pair_sample
from qwen_native.train.scalar import ScalarModel, load_head

SAMPLES = [pair_sample([5, 6], [7, 8, 9], [4]), pair_sample([11], [12, 13], [30, 2, 2])]


@torch.no_grad()
def test_rewards_are_at_the_last_token_of_each_document():
    model = ScalarModel(tiny.model())
    expected = []
    for document in ([5, 6, 7, 8, 9], [5, 6, 4], [11, 12, 13], [11, 30, 2, 2]):
        ends = torch.tensor([0, len(document)], dtype=torch.int32)
        hidden = model.trunk(torch.tensor(document), torch.arange(len(document)), ends)
        expected.append(float(hidden[-1] @ model.score))
    torch.testing.assert_close(model.rewards(SAMPLES), torch.tensor(expected))
    loss, margin = model.pair_losses(SAMPLES)
    torch.testing.assert_close(margin[1], torch.tensor(expected[2] - expected[3]))
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-margin)))


@torch.no_grad()
@pytest.mark.parametrize("tie", [False, True])
def test_saved_models_come_back(tmp_path, tie):
    model = ScalarModel(tiny.model(tie_word_embeddings=tie))
    model.save(tmp_path / "reward")
    again = ScalarModel.load(tmp_path / "reward")
    assert torch.equal(again.rewards(SAMPLES), model.rewards(SAMPLES))
    other = ScalarModel(tiny.model(hidden_size=64))
    with pytest.raises(CheckpointError, match=r"score.weight is \(1, 48\), expected \(1, 64\)"):
        load_head(other, tmp_path / "reward")
    (tmp_path / "reward" / "score.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no score.safetensors"):
        ScalarModel.load(tmp_path / "reward")


def test_a_critic_is_an_adapter_beside_the_policys(tmp_path):
    base = tiny.model()
    base.save(tmp_path / "base")
    config = lora.LoraConfig(rank=4, dropout=0.0)
    lora.add_adapter(base, config, "critic")
    lora.add_adapter(base, config)
    critic = ScalarModel(base, "critic")
    optimizer = torch.optim.Adam(critic.own_parameters().values(), lr=0.01)
    sample = answer_sample([5, 6], [7, 8])
    before = critic.rewards([sample]).item()
    for _ in range(5):
        optimizer.zero_grad()
        critic.rewards([sample]).sum().backward()
        optimizer.step()
    assert critic.rewards([sample]).item() < before - 0.1
    assert all(not p.any() for p in lora.adapter_parameters(base)[1::2])  # the policy's B
    assert lora.lora_layers(base)[0][1].active == lora.POLICY
    critic.save(tmp_path / "critic", str(tmp_path / "base"))
    again = ScalarModel.load(tmp_path / "critic")
    assert again.rewards([sample]).item() == critic.rewards([sample]).item()
    shared = tiny.model()
    lora.add_adapter(shared, config)
    beside = ScalarModel.load(tmp_path / "critic", shared=shared)
    assert beside.rewards([sample]).item() == critic.rewards([sample]).item()
