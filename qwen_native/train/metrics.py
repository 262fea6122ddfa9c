"""What the user sees of a run: progress bar, metrics.jsonl, TensorBoard, estimates."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_PROBE_SIZE = 1024


class Metrics:
    """Writes `metrics.jsonl` in the run's folder, one object per step, and shows progress.

    With a terminal on standard error there is a progress bar, otherwise a line every ten seconds.
    Only the main process writes and shows.
    """

    def __init__(
        self, folder: Path, is_main: bool, tensorboard: bool = False, peak_per_token: float = 0.0
    ) -> None:
        """Open the files.

        Args:
            folder: the run's; is made.
            is_main: False makes everything silent.
            tensorboard: also write events into `folder/tensorboard`.
            peak_per_token: seconds that one token would take at the machine's matrix peak; 0 when
                unknown.
        """
        self.path = folder / "metrics.jsonl"
        self.is_main = is_main
        self.peak_per_token = peak_per_token
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._shown = 0.0
        self._steps = 0
        self._board: Any = None
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            if tensorboard:
                from torch.utils.tensorboard.writer import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Drop what was written after this step, and half a line at the end."""
        if self.is_main and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            aside = self.path.with_suffix(".partial")
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            aside.replace(self.path)

    def restart(self) -> None:
        """Begin with an empty file."""
        if self.is_main:
            self.path.unlink(missing_ok=True)

    @contextmanager
    def showing(self, steps: int, done: int) -> Iterator[None]:
        """Show progress while the body runs."""
        self._steps = steps
        if not self.is_main or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task("", total=steps, completed=done)
            yield
        self._bar = None

    def step(self, **values: float) -> None:
        """Record a step: `step`, `loss`, `tokens_per_second` and whatever else there is."""
        if not self.is_main:
            return
        if self.peak_per_token:
            values["peak_share"] = values["tokens_per_second"] * self.peak_per_token
        self._write(values)
        text = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
        if "peak_share" in values:
            text += f"  {100 * values['peak_share']:.0f} % of peak"
        if self._bar is not None:
            self._bar.update(self._task, completed=values["step"], description=text)
        elif time.monotonic() - self._shown > 10 or values["step"] == self._steps:
            self._shown = time.monotonic()
            self.say(f"step {values['step']:.0f}/{self._steps}  {text}")
        if not math.isfinite(values["gradient_norm"]):
            self.say(f"step {values['step']:.0f}: the gradient is not finite; nothing was updated")

    def evaluation(self, step: int, loss: float, **values: float) -> None:
        """Record the validation loss after a step, and `values` as validation_<name>.

        Without values the loss is a cross-entropy, whose perplexity is shown.
        """
        if self.is_main:
            named = {f"validation_{name}": value for name, value in values.items()}
            self._write({"step": step, "validation_loss": loss, **named})
            more = [f"{name} {value:.4f}" for name, value in values.items()]
            more = more or [f"perplexity {math.exp(loss):.2f}"]
            self.say(f"step {step}: validation loss {loss:.4f} ({', '.join(more)})")

    def say(self, text: str) -> None:
        """Tell the user something, above the progress bar if there is one."""
        if self.is_main:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _write(self, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(values["step"]))
            self._board.flush()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; half a line at the end, of a killed run, is left out."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of this machine's matrix products, measured."""
    a = torch.randn(_PROBE_SIZE, _PROBE_SIZE).to(device, dtype)
    b = torch.randn(_PROBE_SIZE, _PROBE_SIZE).to(device, dtype)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return float(2 * _PROBE_SIZE**3 / min(times))


def available_memory() -> int:
    """Bytes that new allocations may take on this machine, 0 when unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
