"""The processes of a run: one, or those that torchrun starts, with FSDP2 between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from qwen_native.nn import Qwen


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this one's number.
        size: how many there are.
        device: where this one computes.
        distributed: whether torchrun started it (a world of one process may be, too).
    """

    rank: int
    size: int
    device: torch.device
    distributed: bool

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.distributed:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank, on all of them."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        if self.distributed:
            value = value.to(self.device, copy=True)
            dist.all_reduce(value)
        return value


@contextmanager
def world() -> Iterator[World]:
    """Join the processes that torchrun started: NCCL on GPUs, gloo on CPUs; or be alone.

    A process group that is there already is used and stays.
    """
    on_gpu = torch.cuda.is_available()
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, torch.device("cuda" if on_gpu else "cpu"), distributed=False)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, distributed=True)
    finally:
        if not joined:
            dist.destroy_process_group()


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters of a sharded model on the main process; the others get nothing."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def shard(model: nn.Module, state: dict[str, torch.Tensor], world: World, precision: str) -> None:
    """Spread a model over the processes (FSDP2) and fill it with the main process's `state`.

    Parameters stay float32; with precision "bf16" each layer computes with a rounded copy that
    lives only while it is needed, and gradients are summed in float32. Parameters outside of a
    `Qwen`, such as the head of a reward model, are never rounded.

    Args:
        model: on the meta device; a `Qwen`, or a module that holds one or more.
        state: all parameters on the main process, nothing on the others.
        world: the processes.
        precision: "bf16" or "fp32".
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    narrow = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(
        param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for trunk in [module for module in model.modules() if isinstance(module, Qwen)]:
        for layer in trunk.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(trunk, mesh=mesh, mp_policy=policy)
    if any(True for _ in model.parameters(recurse=False)):
        wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, mp_policy=wide)
    model.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(state), options=options)
