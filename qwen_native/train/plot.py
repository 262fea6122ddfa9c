"""`qwen-native train plot`: a PNG of a run's curves."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_native.train.metrics import read_metrics

EXAMPLES = """
  qwen-native train plot runs/small                      writes runs/small/curves.png
  qwen-native train plot runs/a runs/b --out both.png    several runs in one picture"""

_NOT_PLOTTED = {"step", "tokens", "counted_tokens", "peak_share"}
_FIRST = ("loss", "validation_loss")


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="qwen-native train plot",
        description="Draw the curves of training runs.",
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="the PNG; default: curves.png in the first folder")
    options = parser.parse_args(argv)
    out = options.out or options.runs[0] / "curves.png"
    plot(options.runs, out)
    sys.stdout.write(f"{out}\n")
    return 0


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw one panel for each metric, with a curve for each run that has it.

    Raises:
        ValueError: a run has no metrics.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[Path, list[float], list[float]]]] = {}
    for run in runs:
        path = run / "metrics.jsonl"
        lines = read_metrics(path) if path.exists() else []
        if not lines:
            raise ValueError(f"{path}: has no metrics, expected the folder of a run")
        names = {name for line in lines for name in line} - _NOT_PLOTTED
        for name in sorted(names):
            points = [(line["step"], line[name]) for line in lines if name in line]
            steps, values = [step for step, _ in points], [value for _, value in points]
            curves.setdefault(name, []).append((run, steps, values))
    order = sorted(curves, key=lambda name: (name not in _FIRST, name))
    rows = -(-len(order) // 2)
    figure = Figure(figsize=(12, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(order):
        axes = figure.add_subplot(rows, 2, i + 1)
        for run, steps, values in curves[name]:
            marker = "o" if len(steps) < 20 else ""
            axes.plot(steps, values, label=run.name, marker=marker, linewidth=1)
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(runs) > 1:
            axes.legend()
    figure.savefig(out, dpi=120)
