"""The curves of a run as a PNG."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.image import imread

from qwen_native.train.cli import main


def test_every_metric_gets_a_panel(tmp_path, capsys):
    for name, factor in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        lines = [{"step": i, "loss": factor / i, "learning_rate": 0.1} for i in range(1, 30)]
        lines.append({"step": 29, "validation_loss": 0.5})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text + '{"step": 30, "lo')
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    path = tmp_path / "a" / "curves.png"
    assert capsys.readouterr().out == f"{path}\n"
    image = imread(path)
    assert image.shape[:2] == (768, 1440)  # two rows of panels
    assert len(np.unique(image[::4, ::4])) > 10


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no metrics, expected the folder of a run"):
        main(["plot", str(tmp_path)])
