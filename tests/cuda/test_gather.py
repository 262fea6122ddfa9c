"""csrc/kernels/cuda/gather.cu: exact copies, and dequantised rows rounded once."""

from __future__ import annotations

import pytest
import torch
from cuda_gemm import PackedWeight, random_weight
from cuda_simulator import CUDA, Buffer, Simulator, struct


def gather(
    sim: Simulator,
    ids: torch.Tensor,
    table: torch.Tensor | PackedWeight,
    bits: int,
    group_size: int = 0,
    padding: int = 0,
) -> torch.Tensor:
    packed = not isinstance(table, torch.Tensor)
    rows, cols = table.value.shape if isinstance(table, PackedWeight) else table.shape
    codes: Buffer = table.codes if isinstance(table, PackedWeight) else sim.upload(table)
    ids_buffer = sim.upload(ids)
    out = sim.empty((len(ids), cols + padding), torch.bfloat16)
    args = struct("EmbedArgs")(
        out=out.pointer,
        ids=ids_buffer.pointer,
        table=codes.pointer,
        scales=table.scales.pointer if packed else None,
        zeros=table.zeros.pointer if packed and table.zeros else None,
        tokens=len(ids),
        rows=rows,
        cols=cols,
        out_stride=cols + padding,
        group_size=group_size,
        bits=bits,
    )
    assert sim.call("qn_cuda_gather", args) == 0
    if padding:
        assert torch.isnan(out.tensor()[:, cols:]).all(), "wrote beyond a row"
    return out.tensor()[:, :cols]


@pytest.mark.parametrize("cols", [1, 37, 64, 1000, 1024, 2056])
@pytest.mark.parametrize("padding", [0, 3, 8])
def test_bf16(sim, rng, cols, padding):
    table = torch.randn((9, cols), generator=rng).bfloat16()
    ids = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
    assert torch.equal(gather(sim, ids, table, 16, padding=padding), table[ids.long()])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", [(9, 32), (70, 104), (130, 576), (33, 101)])
@pytest.mark.parametrize("zeros", [False, True])
def test_packed(sim, rng, bits, group_size, shape, zeros):
    table = random_weight(sim, rng, shape, bits, group_size, zeros)
    ids = torch.randint(0, shape[0], (5,), generator=rng, dtype=torch.int32)
    out = gather(sim, ids, table, bits, group_size)
    assert torch.equal(out, table.value[ids.long()].bfloat16())


def test_no_tokens(sim):
    ids = torch.zeros(0, dtype=torch.int32)
    assert gather(sim, ids, torch.ones((2, 8)).bfloat16(), 16).shape == (0, 8)


@pytest.mark.parametrize("bits", [16, 4, 8])
@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_threads_does_not_matter(sim, rng, bits, seed):
    table = random_weight(sim, rng, (64, 320), 8 if bits == 16 else bits, 64)
    source = table.value.bfloat16() if bits == 16 else table
    ids = torch.tensor([63, 1], dtype=torch.int32)
    in_order = gather(sim, ids, source, bits, 64)
    sim.configure(seed=seed)
    assert torch.equal(gather(sim, ids, source, bits, 64), in_order)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_traffic(sim, rng, bits):
    rows, cols, tokens = 64, 4096, 3
    table = random_weight(sim, rng, (rows, cols), 8 if bits == 16 else bits, 128)
    source = table.value.bfloat16() if bits == 16 else table
    ids = torch.tensor([5, 60, 17], dtype=torch.int32)
    gather(sim, ids, source, bits, 128)
    counted = sim.counters()
    codes, scales = tokens * cols * bits // 8, 0 if bits == 16 else tokens * cols // 128
    # A row has one scale of every group's row of scales: a sector each.
    assert 32 * counted.distinct_load_sectors <= 1.01 * codes + 32 * (scales + tokens)
    assert 32 * counted.distinct_store_sectors == tokens * cols * 2
    assert counted.store_sectors == counted.store_sectors_needed


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_ptx_agrees(sim, rng, bits):
    table = random_weight(sim, rng, (70, 104), 8 if bits == 16 else bits, 32, zeros=True)
    source = table.value.bfloat16() if bits == 16 else table
    sim.compare_with_ptx(CUDA / "gather.cu")
    gather(sim, torch.tensor([69, 3], dtype=torch.int32), source, bits, 32)
