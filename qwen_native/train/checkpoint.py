"""Checkpoints of a run: atomic, resumable to the bit, the newest N kept.

A run's folder has `checkpoints/step-00001000/` with the tensors (torch.distributed.checkpoint, so
that any number of processes can read what any other number wrote) and `state.json`. A checkpoint is
written aside, flushed to the disk and renamed: killed at any moment, the newest whole one counts.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from qwen_native.files import flush
from qwen_native.train.distributed import World

_NAME = re.compile(r"step-(\d{8})")


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint of a run, oldest first."""
    found = []
    parent = folder / "checkpoints"
    for path in parent.iterdir() if parent.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / "state.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    world: World,
    keep: int,
) -> Path:
    """Write the checkpoint of a step; all processes call it together.

    Args:
        folder: the run's.
        step: how many steps are done.
        tensors: sharded ones are written by the processes that have the parts.
        values: what JSON can hold; the state of torch's random numbers is added.
        world: the processes.
        keep: older checkpoints than the newest `keep` are removed.
    """
    parent = folder / "checkpoints"
    target = parent / f"step-{step:08d}"
    aside = parent / f".{target.name}.partial"
    if world.is_main:
        parent.mkdir(parents=True, exist_ok=True)
        for stale in parent.glob(".*.partial"):
            shutil.rmtree(stale)
    world.barrier()
    writer = FileSystemWriter(aside, sync_files=True)
    with _quiet():
        save(dict(tensors), storage_writer=writer, no_dist=not world.distributed)
    random = world.gather(base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode())
    if world.is_main:
        state = aside / "state.json"
        state.write_text(json.dumps({"step": step, "random": random, **values}))
        flush(state)
        flush(aside)
        if target.exists():  # of a run that was resumed from an earlier step
            shutil.rmtree(target)
        aside.replace(target)
        flush(parent)
        for _, old in checkpoints(folder)[:-keep]:
            gone = old.with_name(f".{old.name}.partial")
            old.replace(gone)
            shutil.rmtree(gone)
    world.barrier()
    return target


def load_checkpoint(path: Path, tensors: Mapping[str, Tensor], world: World) -> dict[str, Any]:
    """Fill `tensors` in place from a checkpoint and restore torch's random numbers.

    With another number of processes than wrote it, random numbers go on from the seed instead.

    Returns:
        The values that were saved, and "step".

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model.
    """
    try:
        values: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        with _quiet():
            load(dict(tensors), checkpoint_id=path, no_dist=not world.distributed)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path}: cannot be resumed from: {_line(first)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: cannot be resumed from: {_line(error)}") from error
    random = values.pop("random")
    if len(random) == world.size:
        state = bytearray(base64.b64decode(random[world.rank]))
        torch.set_rng_state(torch.frombuffer(state, dtype=torch.uint8))
    return values


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning that there is one process only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
