"""Checkpoints: whole or not there, exact, the newest N."""

from __future__ import annotations

import pytest
import torch
from train.tiny import ALONE

from qwen_native.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"m.a": torch.full((3, 4), value), "p.a": torch.full((3, 4), value + 0.1)}


def test_round_trip_restores_tensors_values_and_random_numbers(tmp_path):
    torch.manual_seed(11)
    path = save_checkpoint(tmp_path, 7, tensors(1.5), {"tokens": 99}, ALONE, keep=3)
    expected = torch.rand(5)
    found = tensors(0.0)
    assert load_checkpoint(path, found, ALONE) == {"step": 7, "tokens": 99}
    assert torch.equal(torch.rand(5), expected)
    assert all(torch.equal(found[name], value) for name, value in tensors(1.5).items())


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 10, 11):
        save_checkpoint(tmp_path, step, tensors(step), {}, ALONE, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 11]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    save_checkpoint(tmp_path, 1, tensors(1.0), {}, ALONE, keep=2)
    parent = tmp_path / "checkpoints"
    (parent / ".step-00000002.partial").mkdir()
    (parent / "step-00000003").mkdir()
    assert [step for step, _ in checkpoints(tmp_path)] == [1]
    save_checkpoint(tmp_path, 2, tensors(2.0), {}, ALONE, keep=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2]
    assert not list(parent.glob(".*"))


def test_damage_and_foreign_shapes_are_errors_that_name_the_folder(tmp_path):
    path = save_checkpoint(tmp_path, 1, tensors(1.0), {}, ALONE, keep=2)
    with pytest.raises(ValueError, match="step-00000001: cannot be resumed from"):
        load_checkpoint(path, {"m.a": torch.zeros(2, 2)}, ALONE)
    with pytest.raises(ValueError, match="step-00000001: cannot be resumed from"):
        load_checkpoint(path, {"m.other": torch.zeros(3, 4)}, ALONE)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="step-00000001: cannot be resumed from"):
        load_checkpoint(path, tensors(0.0), ALONE)
