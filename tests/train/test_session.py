"""What surrounds the loop: the command line, the model, the estimate."""

from __future__ import annotations

import pytest
import torch
from train.tiny import ALONE, SHAPE, byte_tokenizer

from qwen_native.train import session
from qwen_native.train.cli import main
from qwen_native.train.config import ModelOptions, ShapeOptions
from qwen_native.train.distributed import World
from qwen_native.train.pretrain import PretrainConfig
from qwen_native.train.session import new_config, open_model, parse

REQUIRED = ["data.context=8", "data.files=x", "optim.learning_rate=1", "run.folder=r"]


def test_options_and_overrides_in_any_order(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {path: demo}\n")
    argv = [str(recipe), *REQUIRED[:2], "--resume", *REQUIRED[2:]]
    config, options = parse(PretrainConfig, argv, "pretrain", "", "")
    assert (config.model.path, config.data.files, config.run.folder) == ("demo", ("x",), "r")
    assert options.resume and not options.estimate
    config, _ = parse(PretrainConfig, ["model.path=demo", *REQUIRED], "pretrain", "", "")
    assert config.model.path == "demo"


def test_help_explains_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    shown = capsys.readouterr().out
    assert "qwen-native train pretrain recipes/pretrain_small.yaml" in shown
    assert "micro_batch_tokens (default 0): most tokens that go through the model" in shown
    assert "learning_rate (required): the peak." in shown


def test_every_command_has_help(capsys):
    from qwen_native.train.cli import COMMANDS

    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    with pytest.raises(ValueError, match="command is 'trian', expected one of pretrain, sft"):
        main(["trian"])


def test_new_models_take_what_is_not_said_from_tokenizer_and_context(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    config = new_config(ModelOptions(shape=SHAPE, tokenizer="bytes"), tokenizer, 96)
    assert (config.vocab_size, config.max_position_embeddings, config.head_dim) == (320, 96, 8)
    shape = ShapeOptions(
        hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, architecture="qwen"
    )
    config = new_config(ModelOptions(shape=shape, tokenizer="bytes"), tokenizer, 96)
    assert config.seq_length == 96 and config.use_dynamic_ntk and config.use_logn_attn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, which architecture qwen"),
        ({"num_kv_heads": 1}, "num_kv_heads is 1, which architecture qwen"),
        ({"head_dim": 8}, "head_dim is 8, which architecture qwen"),
        ({"hidden_size": 33}, "hidden_size is 33, expected a multiple of num_heads 2"),
    ],
)
def test_shapes_that_no_checkpoint_could_have(changes, message):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        ShapeOptions(**(shape | {"architecture": "qwen"} | changes))


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tmp_path):
    shape = ShapeOptions(
        hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, vocab_size=200
    )
    options = ModelOptions(shape=shape, tokenizer="bytes")
    with pytest.raises(ValueError, match="the tokenizer has 259 ids, the model only 200"):
        open_model(options, byte_tokenizer(tmp_path), 32, ALONE)


def test_native_kernels_are_refused_elsewhere_than_on_the_cpu(tmp_path):
    options = ModelOptions(shape=SHAPE, tokenizer="bytes")
    elsewhere = World(0, 1, torch.device("meta"), distributed=False)
    with pytest.raises(
        ValueError, match="native, which computes on the CPU, but the run is on meta"
    ):
        open_model(options, byte_tokenizer(tmp_path), 32, elsewhere)


def test_precision(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        options = ModelOptions(shape=SHAPE, tokenizer="bytes", precision=precision)
        model = open_model(options, tokenizer, 32, ALONE)
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "available_memory", lambda: 100_000)
    text = tmp_path / "a.txt"
    text.write_text("hello " * 50)
    shape = "model.shape={hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2}"
    run = [f"data.files={text}", f"run.folder={tmp_path / 'run'}", "model.tokenizer=bytes"]
    numbers = ["data.context=8", "optim.learning_rate=1e-3", "run.steps=1"]
    with pytest.raises(ValueError, match=r"GB for parameters and optimiser, but only 0\.0 GB"):
        main(["pretrain", shape, *run, *numbers])
