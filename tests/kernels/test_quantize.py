"""csrc/kernels/cpu/quantize.cpp and repack.cpp: every level gives the same bytes, the exact
conversions equal the gguf package bit for bit, the searched ones stay within the rounding of plain
quantisers. Packed bytes are read by tests/quant_reference.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import quant_reference
from gguf_blocks import SOURCES, block, decoded, random_tensor
from guarded import at_page_end

from qwen_native import ops

FORMATS = quant_reference.FORMATS
EXACT = [
    ("Q8_0", "int8_grouped"),
    ("Q5_0", "int8_grouped"),
    ("Q4_0", "int8_grouped"),
    ("Q4_0", "int4_symmetric"),
]
ODD_SHAPES = [(1, 1), (1, 31), (31, 33), (33, 48), (32, 32), (65, 100), (48, 257)]


def pack_floats(weight: np.ndarray, fmt: str) -> ops.PackedWeight:
    weight = np.ascontiguousarray(weight, np.float32)
    return ops.pack_weight(weight.view(np.uint8).reshape(-1), "F32", weight.shape, fmt)


def quantised(weight: np.ndarray, fmt: str) -> np.ndarray:
    """What is left of a float matrix after packing, in float64, by the reference decoder."""
    return quant_reference.decode(fmt, pack_floats(weight, fmt).data, *weight.shape)


def at_all_levels(pack: Callable[[], ops.PackedWeight]) -> list[np.ndarray]:
    results = []
    for isa in ops.available_isas():
        ops.set_isa(isa)
        results.append(pack().data)
    return results


def padded_groups(values: np.ndarray) -> np.ndarray:
    """[rows, groups, 32], zeros beyond the last column."""
    rows, cols = values.shape
    return np.pad(values, ((0, 0), (0, -cols % 32))).reshape(rows, -1, 32)


@pytest.mark.parametrize(("source", "fmt"), EXACT)
@pytest.mark.parametrize("shape", [(1, 32), (31, 64), (33, 32), (70, 160)])
@pytest.mark.parametrize("scale", [1e-6, 0.02, 500.0])
def test_exact_conversions(isa, source, fmt, shape, scale):
    data = random_tensor(source, *shape, np.random.default_rng(1), scale)
    packed = ops.pack_weight(data, source, shape, fmt)
    want = decoded(data, source, *shape)
    np.testing.assert_array_equal(ops.decode_source(data, source, shape), want)
    np.testing.assert_array_equal(ops.unpack_weight(packed), want)
    np.testing.assert_array_equal(
        quant_reference.decode(fmt, packed.data, *shape).astype(np.float32), want
    )


@pytest.mark.parametrize(("source", "fmt"), EXACT)
def test_exact_conversion_of_a_misaligned_map(isa, source, fmt):
    data = random_tensor(source, 3, 64, np.random.default_rng(2))
    shifted = np.empty(data.size + 1, np.uint8)[1:]
    shifted[:] = data
    packed = ops.pack_weight(shifted, source, (3, 64), fmt)
    np.testing.assert_array_equal(ops.unpack_weight(packed), decoded(data, source, 3, 64))


@pytest.mark.parametrize(("source", "fmt"), EXACT)
def test_exact_conversions_same_bytes_at_all_levels(source, fmt):
    data = random_tensor(source, 70, 96, np.random.default_rng(3))
    first, *others = at_all_levels(lambda: ops.pack_weight(data, source, (70, 96), fmt))
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "Q4_1", "Q5_1", "Q6_K", "Q4_K"])
def test_search_same_bytes_at_all_levels(source, fmt):
    shape = (70, 2 * block(source)[0] if source[0] == "Q" else 75)
    data = random_tensor(source, *shape, np.random.default_rng(4))
    first, *others = at_all_levels(lambda: ops.pack_weight(data, source, shape, fmt))
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("fmt", FORMATS)
def test_result_does_not_depend_on_threads_or_other_rows(isa, fmt):
    weight = np.random.default_rng(5).standard_normal((70, 96)).astype(np.float32)
    whole = quantised(weight, fmt)
    for row in (0, 15, 16, 40, 69):
        np.testing.assert_array_equal(quantised(weight[row : row + 1], fmt)[0], whole[row])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_layout_and_padding(isa, fmt, shape):
    weight = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    packed = pack_floats(weight, fmt)
    assert packed.format == fmt and packed.shape == shape == (packed.rows, packed.cols)
    assert packed.nbytes == quant_reference.packed_bytes(fmt, *shape)
    parts = quant_reference.unpack(fmt, packed.data, *shape)
    rows, cols = shape
    assert not parts.scale[rows:].any() and not parts.min[rows:].any()
    assert not parts.row_scale[rows:].any() and not parts.row_min[rows:].any()
    values = quant_reference.dequantize(fmt, parts)
    assert not values[rows:].any()
    if fmt != "int4":
        assert not values[:, cols:].any()
    np.testing.assert_allclose(  # one product and one difference, both rounded
        ops.unpack_weight(packed), values[:rows, :cols], atol=2e-7 * np.abs(values).max()
    )
    if fmt.startswith("int4"):
        largest = np.abs(values[:, :cols]).max(1)
        np.testing.assert_allclose(parts.fold_scale, largest / 127, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(33, 96), (5, 33)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_int8_is_plain_rounding(isa, shape, size):
    weight = (np.random.default_rng(7).standard_normal(shape) * size).astype(np.float32)
    parts = quant_reference.unpack("int8", pack_floats(weight, "int8").data, *shape)
    want = quant_reference.quantize("int8", weight)
    np.testing.assert_allclose(parts.row_scale, want.row_scale, rtol=2e-7, atol=0)
    off = parts.codes.astype(int) - want.codes  # a scale's last bit moves codes on the edge
    assert np.abs(off).max() <= 1 and np.count_nonzero(off) <= 1


@pytest.mark.parametrize("shape", [(33, 96), (5, 33)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_int8_grouped_never_worse_than_plain_rounding(isa, shape, size):
    weight = (np.random.default_rng(7).standard_normal(shape) * size).astype(np.float32)
    groups = padded_groups(weight.astype(np.float64))
    scale = (np.abs(groups).max(-1) / np.float32(127)).astype(np.float16).astype(np.float64)
    plain = np.rint(groups / scale[..., None]) * scale[..., None]
    ours = padded_groups(quantised(weight, "int8_grouped"))
    error, plain_error = (np.square(x - groups).sum(-1) for x in (ours, plain))
    # 1e-5: the kernel compares float32 sums, and may round the scale of a tie the other way.
    assert (error <= plain_error * (1 + 1e-5)).all()
    assert error.sum() < plain_error.sum()


def test_int4_symmetric_never_worse_than_q4_0(isa):
    weight = np.random.default_rng(8).standard_normal((64, 256)).astype(np.float32)
    groups = padded_groups(weight.astype(np.float64))
    at = np.abs(groups).argmax(-1, keepdims=True)
    scale = (np.take_along_axis(groups, at, -1) / -8).astype(np.float16).astype(np.float64)
    plain = np.clip(np.rint(groups / scale), -8, 7) * scale
    ours = padded_groups(quantised(weight, "int4_symmetric"))
    error, plain_error = (np.square(x - groups).sum(-1) for x in (ours, plain))
    assert (error <= plain_error * (1 + 1e-5)).all()
    assert error.sum() < 0.9 * plain_error.sum()


@pytest.mark.parametrize(
    ("fmt", "limit"),
    # docs/KERNELS.md: a Gaussian needs 0.0053 (8 bits in groups), 0.081 (4 bits, symmetric), 0.070
    # (int4); int8's step is the largest of 512, about 3.2, over 127, and its error step / sqrt(12).
    [("int8", 0.0078), ("int8_grouped", 0.0054), ("int4_symmetric", 0.083), ("int4", 0.072)],
)
@pytest.mark.parametrize("size", [1e-6, 0.02, 1e4])
def test_relative_error_of_gaussian_weights(isa, fmt, limit, size):
    if fmt in ("int8_grouped", "int4_symmetric") and size == 1e-6:
        limit *= 1.5 if fmt == "int4_symmetric" else 12  # binary16's coarse subnormals
    weight = (np.random.default_rng(9).standard_normal((64, 512)) * size).astype(np.float32)
    error = quantised(weight, fmt) - weight
    assert np.sqrt(np.square(error).sum() / np.square(weight, dtype=np.float64).sum()) <= limit


@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_weights_stay_zero(isa, fmt):
    weight = np.zeros((33, 96), np.float32)
    weight[3, 32:64] = np.linspace(-1, 1, 32)
    result = quantised(weight, fmt)
    mask = np.ones_like(weight, bool)
    mask[3] = False
    assert not result[mask].any()
    assert not result[3, :32].any() and not result[3, 64:].any()
    assert not quantised(np.zeros((1, 7), np.float32), fmt).any()


@pytest.mark.parametrize("value", [0.37, -0.37, -5.0])
def test_constant_groups(isa, value):
    weight = np.full((5, 64), value, np.float32)
    # A row of one constant is exact up to the formats' rounding of the scale.
    np.testing.assert_allclose(quantised(weight, "int8"), value, rtol=1e-6)
    np.testing.assert_allclose(quantised(weight, "int8_grouped"), value, rtol=2.0**-11)
    np.testing.assert_allclose(quantised(weight, "int4_symmetric"), value, rtol=2.0**-11)
    np.testing.assert_allclose(quantised(weight, "int4"), value, rtol=1e-6)


@pytest.mark.parametrize("offset", [-100.0, -1.0, 0.5])
def test_one_sided_groups(isa, offset):
    """Negative groups keep the resolution of their spread; positive ones start at zero."""
    weight = np.random.default_rng(10).random((8, 64)).astype(np.float32) * 0.4 + offset
    error = np.abs(padded_groups(quantised(weight, "int4") - weight))
    low = np.minimum(padded_groups(weight).min(-1), 0)
    step = (padded_groups(weight).max(-1) - low)[..., None] / 15
    # Half a step for the code, and half of 1/255 of the row's largest scale times 15 and min.
    bound = 0.75 * step + (step.max(1, keepdims=True) * 15 + np.abs(low).max()) / 510
    assert (error <= bound).all()


def test_outlier_harms_its_own_group_only(isa):
    weight = np.random.default_rng(11).standard_normal((4, 128)).astype(np.float32)
    calm = quantised(weight, "int8_grouped")
    weight[2, 40] = 1e5
    result = quantised(weight, "int8_grouped")
    assert abs(result[2, 40] - 1e5) <= 1e5 * 2.0**-11
    np.testing.assert_array_equal(np.delete(result, 1, 1)[:, 64:], np.delete(calm, 1, 1)[:, 64:])
    # Int8's own row is lost in the outlier's steps, and no other.
    result = quantised(weight, "int8")
    assert abs(result[2, 40] - 1e5) < 0.1
    assert np.abs(result - weight)[2].max() <= 1e5 / 254 * (1 + 1e-6)
    assert np.abs(np.delete(result - weight, 2, 0)).max() < 0.02
    # Int4's scales share the row's factor: its other groups keep 1/255 of the outlier's step.
    result = quantised(weight, "int4")
    step = (1e5 - weight[2].min()) / 15
    assert abs(result[2, 40] - 1e5) <= step / 2
    assert np.abs(result - weight)[2].max() <= step
    assert np.abs(np.delete(result - weight, 2, 0)).max() < 0.4


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-9])
def test_tiny_weights(isa, fmt, size):
    weight = (np.random.default_rng(12).random((3, 40)) * size).astype(np.float32)
    result = quantised(weight, fmt)
    # binary16 scales end at 2^-24; Int8 takes rows and Int4 groups below 2^-100 as zero.
    floor = 2.0**-101 * 2 if fmt in ("int8", "int4") else 2.0**-25
    assert np.abs(result - weight).max() <= max(floor, size / 15)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [(0, 0), (17, 39), (40, 40)])
def test_infinite_and_nan_weights_are_named(isa, fmt, value, at):
    weight = np.ones((41, 41), np.float32)
    weight[at] = value
    with pytest.raises(ValueError, match=f"row {at[0]}, column {at[1]} is .*a finite number"):
        pack_floats(weight, fmt)


@pytest.mark.parametrize(
    ("fmt", "largest"),
    [
        ("int8", 2.0**60),
        ("int8_grouped", 127 * 65504.0),
        ("int4_symmetric", 7 * 65504.0),
        ("int4", 2.0**60),
    ],
)
def test_largest_weight(isa, fmt, largest):
    weight = np.zeros((2, 33), np.float32)
    weight[1, 32] = largest
    assert quantised(weight, fmt)[1, 32] == pytest.approx(largest, rel=0.01)
    weight[1, 32] = -1.001 * largest
    with pytest.raises(ValueError, match=f"row 1, column 32 is .*in magnitude for {fmt}"):
        pack_floats(weight, fmt)


@pytest.mark.parametrize(("source", "fmt"), EXACT)
@pytest.mark.parametrize("pattern", [0x7C00, 0xFC00, 0x7E00])
def test_infinite_block_scales_are_named(isa, source, fmt, pattern):
    data = random_tensor(source, 40, 64, np.random.default_rng(13))
    blocks = data.reshape(40, 2, -1)
    blocks[37, 1, :2] = np.array([pattern], np.uint16).view(np.uint8)
    with pytest.raises(ValueError, match="row 37, column .*a finite number"):
        ops.pack_weight(data, source, (40, 64), fmt)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fmt", ["f32", "bf16", *FORMATS])
def test_nothing_is_read_past_the_tensor(isa, source, fmt):
    width = block(source)[0]
    for rows, cols in [(1, width), (33, 3 * width)]:
        data = random_tensor(source, rows, cols, np.random.default_rng(15))
        with at_page_end(data) as guarded:
            packed = ops.pack_weight(guarded, source, (rows, cols), fmt)
        np.testing.assert_array_equal(
            packed.data, ops.pack_weight(data, source, (rows, cols), fmt).data
        )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_arbitrary_bytes_pack_or_are_refused(isa, source, fmt):
    """A file may hold anything: the result is finite, or the error names a row."""
    rng = np.random.default_rng(16)
    rows, cols = 3, 2 * block(source)[0]
    for _ in range(20):
        data = rng.integers(0, 256, rows * 2 * block(source)[1], np.uint8)
        try:
            packed = ops.pack_weight(data, source, (rows, cols), fmt)
        except ValueError as error:
            assert "weight at row" in str(error)
        else:
            assert np.isfinite(ops.unpack_weight(packed)).all()


def test_packed_weight_from_bytes():
    weight = np.random.default_rng(14).standard_normal((33, 40)).astype(np.float32)
    data = quant_reference.encode("int4", weight)
    packed = ops.PackedWeight(data, "int4", 33, 40)
    np.testing.assert_array_equal(packed.data, data)
    with pytest.raises(ValueError, match=r"has 10 bytes, expected .* for int4\[33, 40\]"):
        ops.PackedWeight(data[:10], "int4", 33, 40)
    with pytest.raises(ValueError, match="format is 'int5', expected one of f32"):
        ops.PackedWeight(data, "int5", 33, 40)
    with pytest.raises(TypeError):
        ops.PackedWeight(weight, "f32", 33, 40)
