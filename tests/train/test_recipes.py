"""Every recipe: valid, with the report's numbers, and the small ones run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from train.tiny import ROOT

from qwen_native.nn import Qwen
from qwen_native.train.cli import COMMANDS, main
from qwen_native.train.config import load_config
from qwen_native.train.optim import learning_rate
from qwen_native.train.pretrain import PretrainConfig
from qwen_native.train.session import new_config
from qwen_native.train.sft import SftConfig

RECIPES = ROOT / "recipes"
KINDS = {"pretrain": PretrainConfig, "code": PretrainConfig, "sft": SftConfig, "math": SftConfig}


class NoTokenizer:
    vocab_size = 151851


def load(name: str):
    return load_config(KINDS[name.split("_")[0]], RECIPES / f"{name}.yaml", [])


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [
        ("pretrain_1.8b", 1_836_828_672, 2.2e12),
        ("pretrain_7b", 7_721_324_544, 2.4e12),
        ("pretrain_14b", 14_167_290_880, 3.0e12),
    ],
)
def test_pretraining_of_the_report(name, parameters, tokens):
    config = load(name)
    with torch.device("meta"):
        model = Qwen(new_config(config.model, NoTokenizer(), config.data.context))
    assert sum(p.numel() for p in model.parameters()) == parameters
    per_step = config.run.batch_size * config.data.context
    assert per_step == 1 << 22
    assert config.run.steps * per_step == pytest.approx(tokens, rel=1e-5)
    rates = [learning_rate(config.optim, s, config.run.steps) for s in (0, 1999, 2000)]
    assert rates[1] == 3e-4 > rates[2] > rates[0]
    last = learning_rate(config.optim, config.run.steps - 1, config.run.steps)
    assert last == pytest.approx(3e-5)


@pytest.mark.parametrize(("name", "rate"), [("code_qwen_7b", 3e-5), ("code_qwen_14b", 6e-5)])
def test_code_qwen(name, rate):
    config = load(name)
    assert config.data.context == 8192
    assert config.run.steps * config.run.batch_size * 8192 == pytest.approx(90e9, rel=1e-4)
    steps = config.run.steps
    assert learning_rate(config.optim, int(0.03 * steps) + 1, steps) == rate
    assert learning_rate(config.optim, steps - 1, steps) == rate


def test_fine_tuning_of_the_report():
    sft, math = load("sft"), load("math_qwen")
    assert (sft.data.context, sft.run.batch_size, sft.run.steps) == (2048, 128, 4000)
    assert learning_rate(sft.optim, 1429, 4000) == learning_rate(sft.optim, 3999, 4000) == 2e-6
    assert (sft.optim.weight_decay, sft.optim.clip_norm, sft.model.dropout) == (0.1, 1.0, 0.1)
    assert (math.data.context, math.run.steps, math.optim.learning_rate) == (1024, 50000, 2e-5)
    for config in (sft, math):
        assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.95, 1e-8)


def test_the_small_ones_run_one_after_the_other(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    small = ["data.files=[recipes/data/animals.jsonl, recipes/*.yaml]", "run.steps=2"]
    held_out = ["data.validation_files=[recipes/sft.yaml]", f"run.folder={tmp_path / 'a'}"]
    assert main(["pretrain", "recipes/pretrain_small.yaml", *small, *held_out]) == 0
    changes = [f"model.path={tmp_path / 'a' / 'model'}", f"run.folder={tmp_path / 'b'}"]
    sft = ["sft", "recipes/sft_small.yaml", *changes, "run.steps=2", "run.tensorboard=true"]
    assert main([*sft, "--estimate"]) == 0
    assert not (tmp_path / "b" / "model").exists()
    assert main(sft) == 0
    assert (tmp_path / "b" / "model" / "model.safetensors").exists()
    assert list((tmp_path / "b" / "tensorboard").glob("events*"))
    shown = capfd.readouterr().err
    assert shown.count("memory per process about") == 3
    assert "records are malformed" in shown  # the chats have no text


def test_no_recipe_has_unknown_keys_and_every_one_explains_itself():
    for path in RECIPES.glob("*.yaml"):
        assert path.read_text().startswith("# "), path
        assert yaml.safe_load(path.read_text()).keys() >= {"model", "optim", "run"}, path
        if path.stem.split("_")[0] in KINDS:
            load(path.stem)
    assert Path(RECIPES / "data" / "animals.jsonl").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_recipes_that_exist(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown and f"qwen-native train {command}" in shown
    for name in re.findall(r"recipes/[\w.]+\.yaml", shown):
        assert (ROOT / name).exists(), name
