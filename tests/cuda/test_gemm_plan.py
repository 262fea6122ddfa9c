"""csrc/kernels/cuda/gemm_plan.cu: the launch shapes, a pure host function."""

from __future__ import annotations

import ctypes

import pytest
from cuda_simulator import struct


def plan_of(sim, tokens, rows, cols, multiprocessors=108, group_size=128, invariant=False):
    args = struct("GemmArgs")(
        tokens=tokens, rows=rows, cols=cols, group_size=group_size, invariant=invariant
    )
    device = struct("DeviceInfo")(multiprocessors=multiprocessors)
    plan = struct("GemmPlan")()
    sim.library.qn_cuda_gemm_plan(ctypes.byref(args), ctypes.byref(device), ctypes.byref(plan))
    return plan


@pytest.mark.parametrize(
    ("tokens", "tile"), [(1, 16), (16, 16), (17, 64), (64, 64), (65, 128), (4096, 128)]
)
def test_tile_covers_the_tokens(sim, tokens, tile):
    plan = plan_of(sim, tokens, 4096, 4096)
    assert plan.tile_tokens == tile and plan.token_tiles == -(-tokens // tile)


def test_a_decode_step_occupies_every_multiprocessor(sim):
    small = plan_of(sim, 1, 4096, 4096)
    assert small.blocks == 108 and small.split
    large = plan_of(sim, 1, 11008, 4096)
    assert large.blocks == 216 and large.split


def test_a_prefill_has_one_block_per_tile(sim):
    plan = plan_of(sim, 4096, 4096, 4096)
    assert plan.blocks == 32 * 32 and not plan.split


def test_invariant_never_splits(sim):
    plan = plan_of(sim, 1, 4096, 4096, invariant=True)
    assert plan.blocks == 32 and not plan.split


def test_a_block_has_at_least_four_units_of_work_or_all(sim):
    plan = plan_of(sim, 1, 128, 512)
    assert plan.blocks == 2
    assert plan_of(sim, 1, 128, 64).blocks == 1


@pytest.mark.parametrize(
    ("group_size", "shift"), [(32, 0), (64, 0), (128, 1), (512, 3), (4096, 30)]
)
def test_stages_of_a_group(sim, group_size, shift):
    assert plan_of(sim, 1, 128, 4096, group_size=group_size).scale_shift == shift
