"""csrc/kernels/cuda/repack.cu: weights as quant_layout.h packs them, in gemm_layout.h's order."""

from __future__ import annotations

import pytest
import quant_reference
import torch
from cuda_gemm import TILE, pack_codes
from cuda_simulator import CUDA, Buffer, Simulator, enum_value, struct

FORMATS = {"int8": "Int8", "int8_grouped": "Int8Grouped", "int4_symmetric": "Int4Symmetric"}


def padded(n: int) -> int:
    return -(-n // TILE) * TILE


def repack(
    sim: Simulator, fmt: str, weight: torch.Tensor, chunk_rows: int
) -> tuple[Buffer, Buffer]:
    """The weight quantised by the reference and repacked, `chunk_rows` rows at a time."""
    rows, cols = weight.shape
    bits = 4 if fmt == "int4_symmetric" else 8
    groups = 1 if fmt == "int8" else -(-cols // quant_reference.GROUP)
    codes = sim.empty((padded(rows) * padded(cols) * bits // 32,), torch.int32)
    scales = sim.empty((groups, padded(rows)), torch.float16)
    for first in range(0, rows, chunk_rows):
        part = weight[first : first + chunk_rows]
        source = sim.upload(torch.from_numpy(quant_reference.encode(fmt, part.numpy())))
        args = struct("RepackTilesArgs")(
            source=source.pointer,
            codes=codes.pointer,
            scales=scales.pointer,
            first_row=first,
            rows=len(part),
            cols=cols,
            total_rows=rows,
            format=enum_value("WeightFormat", FORMATS[fmt]),
        )
        assert sim.call("qn_cuda_repack", args) == 0
    return codes, scales


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    "rows, cols, chunk_rows",
    [(64, 64, 64), (1, 8, 64), (200, 232, 128), (97, 32, 64), (33, 96, 64)],
)
def test_codes_and_scales(sim, rng, fmt, rows, cols, chunk_rows):
    weight = torch.randn((rows, cols), generator=rng) * 0.1
    sim.configure(seed=rows)
    codes, scales = repack(sim, fmt, weight, chunk_rows)

    parts = quant_reference.quantize(fmt, weight.numpy())
    offset = 128 if fmt == "int8" else 0  # Int8 is signed on the CPU
    by_row = torch.from_numpy(parts.codes.astype("int64")).flatten(1) + offset
    zero = 8 if fmt == "int4_symmetric" else 128
    expected = torch.full((padded(rows), padded(cols)), zero)
    expected[: by_row.shape[0], : by_row.shape[1]] = by_row[: padded(rows), : padded(cols)]
    assert torch.equal(codes.tensor(), pack_codes(expected, 4 if zero == 8 else 8))

    scale = parts.row_scale[:, None] if fmt == "int8" else parts.scale
    expected_scales = torch.zeros((scale.shape[1], padded(rows)), dtype=torch.float16)
    values = torch.from_numpy(scale.T.copy()).half()
    expected_scales[:, : values.shape[1]] = values[:, : padded(rows)]
    assert torch.equal(scales.tensor(), expected_scales)


@pytest.mark.parametrize("fmt", FORMATS)
def test_traffic(sim, rng, fmt):
    """Source and result cross global memory once."""
    weight = torch.randn((128, 256), generator=rng)
    codes, scales = repack(sim, fmt, weight, 128)
    counted = sim.counters()
    source = quant_reference.packed_bytes(fmt, 128, 256)
    assert 32 * counted.distinct_load_sectors <= source
    assert 32 * counted.distinct_store_sectors == codes.bytes + scales.bytes
    assert counted.store_sectors == counted.store_sectors_needed


@pytest.mark.parametrize("fmt", FORMATS)
def test_ptx_agrees(sim, rng, fmt):
    sim.compare_with_ptx(CUDA / "repack.cu")
    repack(sim, fmt, torch.randn((40, 72), generator=rng), 64)
