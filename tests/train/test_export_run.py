"""Checkpoints as Hugging Face folders."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from qwen_native.train.cli import main


def test_any_checkpoint_becomes_a_folder(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("hello there, general. " * 40)
    run = tmp_path / "run"
    shape = "{hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2}"
    arguments = [
        f"model.shape={shape}", "model.tokenizer=bytes", f"data.files={text}", "data.context=16",
        "optim.learning_rate=1e-2", f"run.folder={run}", "run.steps=4", "run.save_every=2",
    ]  # fmt: skip
    assert main(["pretrain", *arguments]) == 0
    for name, options in (("last", []), ("middle", ["--step", "2"])):
        assert main(["export", str(run), str(tmp_path / name), *options]) == 0
    final = (run / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == final
    names = {path.name for path in (run / "model").iterdir()}
    assert {path.name for path in (tmp_path / "middle").iterdir()} == names
    middle = load_file(tmp_path / "middle" / "model.safetensors")
    last = load_file(tmp_path / "last" / "model.safetensors")
    assert any((middle[name] != last[name]).any() for name in last)

    with pytest.raises(ValueError, match="no checkpoint of step 3; those there are: 2, 4"):
        main(["export", str(run), str(tmp_path / "x"), "--step", "3"])
    with pytest.raises(ValueError, match="exists already"):
        main(["export", str(run), str(tmp_path / "last")])
