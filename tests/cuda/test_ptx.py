"""The functions of ptx.cuh, as the executor carries them out, against independent statements.

Fragment layouts are stated as the PTX ISA does, element by element, with groupID = lane >> 2 and
threadID_in_group = lane % 4, and were compared with its text, versions 9.0 to 9.2
(https://docs.nvidia.com/cuda/parallel-thread-execution/), chapter "Matrix multiply-accumulate
operation using mma instruction": "Matrix Fragments for mma.m16n8k16 with floating point type"
(section 5.8 there), "Matrix Fragments for mma.m16n8k32" and "Warp-level matrix load instruction:
ldmatrix" (section 5.15).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from cuda_simulator import Simulator

LANES = range(32)


# ---- fragments of m16n8k16 (.f16, .bf16): 8 elements of A, 4 of B; of m16n8k32 (.s8): 16 and 8


def a_position_k16(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    col = in_group * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, col


def b_position_k16(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return in_group * 2 + (i & 1) + (0 if i < 2 else 8), group


def a_position_k32(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    row = group if 0 <= i < 4 or 8 <= i < 12 else group + 8
    col = in_group * 4 + (i & 3) + (0 if i < 8 else 16)
    return row, col


def b_position_k32(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return in_group * 4 + (i & 3) + (0 if i < 4 else 16), group


def c_position(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), in_group * 2 + (i & 1)


def scatter(
    matrix: np.ndarray, position: Callable[[int, int], tuple[int, int]], elements: int
) -> np.ndarray:
    """The lanes' elements [32, elements] of a matrix."""
    picked = [[matrix[position(lane, i)] for i in range(elements)] for lane in LANES]
    return np.array(picked, dtype=matrix.dtype)


def gather(fragments: np.ndarray) -> np.ndarray:
    """The 16x8 matrix of accumulator fragments [32, 4]."""
    matrix = np.zeros((16, 8), fragments.dtype)
    for lane in LANES:
        for i in range(4):
            matrix[c_position(lane, i)] = fragments[lane, i]
    return matrix


def registers(elements: np.ndarray) -> torch.Tensor:
    """Elements packed into 32-bit registers, the first one lowest."""
    return torch.from_numpy(np.ascontiguousarray(elements).view(np.int32).copy())


def call_mma(
    cases: Simulator, launcher: str, a: np.ndarray, b: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """d = a b + c by one mma of a warp."""
    k32 = a.shape[1] == 32
    a_fragments = scatter(a, a_position_k32 if k32 else a_position_k16, 16 if k32 else 8)
    b_fragments = scatter(b, b_position_k32 if k32 else b_position_k16, 8 if k32 else 4)
    d = cases.upload(torch.from_numpy(scatter(c, c_position, 4)))
    operands = [cases.upload(registers(fragments)) for fragments in (a_fragments, b_fragments)]
    assert cases.call(launcher, d, *operands) == 0
    return gather(d.tensor().numpy())


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def widen_f16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float64)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(4)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_of_16_bit_floats(cases: Simulator, random: np.random.Generator, kind: str):
    a32, b32 = (random.standard_normal(s).astype(np.float32) for s in ((16, 16), (16, 8)))
    c = random.standard_normal((16, 8)).astype(np.float32)
    if kind == "bf16":
        a, b, widen = bf16_bits(a32), bf16_bits(b32), widen_bf16
    else:
        a, b = (m.astype(np.float16).view(np.uint16) for m in (a32, b32))
        widen = widen_f16
    d = call_mma(cases, f"wrapped_mma_{kind}", a, b, c)
    assert np.array_equal(d, (widen(a) @ widen(b) + c).astype(np.float32))
    assert cases.counters().mma == 1


def test_mma_of_bytes(cases: Simulator, random: np.random.Generator):
    a, b = (random.integers(-128, 128, s).astype(np.int8) for s in ((16, 32), (32, 8)))
    c = random.integers(-(2**31), 2**31, (16, 8)).astype(np.int32)
    d = call_mma(cases, "wrapped_mma_s8", a, b, c)
    exact = a.astype(np.int64) @ b.astype(np.int64) + c
    assert np.array_equal(d, exact.astype(np.int32))  # wraps around


def test_ldmatrix(cases: Simulator, random: np.random.Generator):
    matrices = random.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    rows = cases.upload(registers(matrices.reshape(32, 8)))
    out = cases.empty((32, 14), torch.int32)
    assert cases.call("wrapped_ldmatrix", out, rows) == 0
    result = out.tensor().numpy().view(np.uint32)
    for lane in LANES:
        # Lanes 0 to 7 point to the rows of the first matrix, 8 to 15 of the second, and so on. Of
        # each, t holds elements 2 (t % 4) and 2 (t % 4) + 1 of row t / 4, with .trans of column
        # t / 4.
        row, col = lane // 4, lane % 4 * 2
        straight = [int(m[row, col]) | int(m[row, col + 1]) << 16 for m in matrices]
        turned = [int(m[col, row]) | int(m[col + 1, row]) << 16 for m in matrices]
        expected = [*straight[:1], *straight[:2], *straight, *turned[:1], *turned[:2], *turned]
        assert result[lane].tolist() == expected
    counters = cases.counters()
    assert (counters.ldmatrix, counters.ldmatrix_wavefronts) == (6, 2 * (1 + 2 + 4))


# ---- arithmetic


def round_to(value: Fraction, mantissa: int, smallest: int, largest: int) -> Fraction | float:
    """To nearest, ties to even, in a format with these stored bits and exponents."""
    if value == 0:
        return Fraction(0)
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if Fraction(2) ** exponent > abs(value):
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, smallest) - mantissa)
    rounded = round(value / unit) * unit
    return rounded if abs(rounded) < Fraction(2) ** (largest + 1) else float("inf")


def fma_16(a: int, b: int, c: int, widen: Callable, formats: tuple[int, int, int]) -> float:
    x, y, z = (float(widen(np.array([v], np.uint16))[0]) for v in (a, b, c))
    return float(round_to(Fraction(x) * Fraction(y) + Fraction(z), *formats))


def halves(words: np.ndarray) -> np.ndarray:
    """[n, 2]: lower and upper 16 bits."""
    return np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2)


def arithmetic_inputs(random: np.random.Generator, n: int) -> list[np.ndarray]:
    x = (random.standard_normal(n) * np.exp2(random.integers(-14, 15, n))).astype(np.float32)
    x[:6] = [0.0, np.inf, -2.5, 1e-40, 150.0, -1.0000001]
    y = np.roll(x, 7)
    # Ties of the rounding to bf16: the dropped half is exactly one half of the last place.
    y[-64:] = (y[-64:].view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    kinds = random.standard_normal((3, n, 2)).astype(np.float16)
    pairs = [np.ascontiguousarray(k).view(np.uint16).reshape(n, 2) for k in kinds]
    a, b, c = (np.ascontiguousarray(p).view(np.uint32)[:, 0].copy() for p in pairs)
    return [x, y, a, b, c]


def call_arithmetic(cases: Simulator, inputs: list[np.ndarray]) -> np.ndarray:
    n = len(inputs[0])
    out = cases.empty((n, 17), torch.int32)
    buffers = [cases.upload(torch.from_numpy(v.view(np.int32).copy())) for v in inputs]
    assert cases.call("wrapped_arithmetic", out, *buffers, n) == 0
    return out.tensor().numpy().view(np.uint32)


def test_conversions(cases: Simulator, random: np.random.Generator):
    x, y, a, *rest = arithmetic_inputs(random, 256)
    out = call_arithmetic(cases, [x, y, a, *rest])
    assert np.array_equal(halves(out[:, 0]), np.stack([bf16_bits(x), bf16_bits(y)], 1))
    with np.errstate(over="ignore"):
        f16 = [v.astype(np.float16).view(np.uint16) for v in (x, y)]
    assert np.array_equal(halves(out[:, 1]), np.stack(f16, 1))
    for column, widen, half in [(2, widen_bf16, 0), (3, widen_bf16, 1)]:
        assert np.array_equal(out[:, column].view(np.float32), widen(halves(a)[:, half]))
    for column, half in [(4, 0), (5, 1)]:
        expected = widen_f16(np.ascontiguousarray(halves(a)[:, half]))
        assert np.array_equal(out[:, column].view(np.float32), expected)


def test_nan_becomes_the_canonical_one(cases: Simulator):
    x = np.full(32, np.nan, np.float32)
    zeros = np.zeros(32, np.uint32)
    out = call_arithmetic(cases, [x, -x, zeros, zeros, zeros])
    assert (out[:, :2] == 0x7FFF7FFF).all()


@pytest.mark.parametrize(
    ("column", "widen", "formats"), [(6, widen_bf16, (7, -126, 127)), (7, widen_f16, (10, -14, 15))]
)
def test_fused_multiply_add(
    cases: Simulator, random: np.random.Generator, column: int, widen: Callable, formats: tuple
):
    inputs = arithmetic_inputs(random, 256)
    result = halves(call_arithmetic(cases, inputs)[:, column])
    for row, words in zip(result, zip(*map(halves, inputs[2:]), strict=True), strict=True):
        for half in range(2):
            expected = fma_16(*(int(word[half]) for word in words), widen, formats)
            assert float(widen(row[half : half + 1])[0]) == expected


def test_sum_is_rounded_once(cases: Simulator):
    """17/16 squared is 1 + 1/8 + 1/256, a tie in bf16, and float32 cannot hold another 2^-33."""
    a, b, c = (np.full(32, bits, np.uint32) for bits in (0x3F88, 0x3F88, 0x2F00))
    zeros = np.zeros(32, np.float32)
    out = call_arithmetic(cases, [zeros, zeros, a, b, c])[:, 6]
    exact = Fraction(17, 16) ** 2 + Fraction(1, 2**33)
    expected = round_to(exact, 7, -126, 127)
    assert expected == 1 + Fraction(1, 8) + Fraction(1, 128)
    assert (widen_bf16(halves(out)[:, 0]) == float(expected)).all()


def test_integer_arithmetic(cases: Simulator, random: np.random.Generator):
    inputs = arithmetic_inputs(random, 256)
    a, b, c = inputs[2:] = list(random.integers(0, 1 << 32, (3, 256)).astype(np.uint32))
    a[:2] = [0, 0xFFFFFFFF]
    out = call_arithmetic(cases, inputs)
    assert np.array_equal(out[:, 8], (a & b) | c)
    bytes_of = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], 1)
    for i, selector in enumerate(c):
        picked = 0
        for byte in range(4):
            which = int(selector) >> 4 * byte & 15
            value = int(bytes_of[i, which & 7])
            if which & 8:
                value = 255 if value & 128 else 0
            picked |= value << 8 * byte
        assert out[i, 9] == picked
    products = a[:, None].view(np.int8).astype(np.int64) * b[:, None].view(np.int8)
    dot = products.sum(1) + c.view(np.int32)
    assert np.array_equal(out[:, 10], dot.astype(np.uint64).astype(np.uint32))
    assert np.array_equal(out[:, 15], (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32))
    for i, word in enumerate(map(int, a)):
        ffs = (word & -word).bit_length()
        assert out[i, 16] == word.bit_count() | (32 - word.bit_length()) << 8 | ffs << 16


def test_approximations(cases: Simulator, random: np.random.Generator):
    x, *rest = arithmetic_inputs(random, 256)
    out = call_arithmetic(cases, [x, *rest]).view(np.float32)
    with np.errstate(all="ignore"):
        wide = np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float64)
        expected = [np.exp2(wide), np.log2(np.abs(wide)), 1 / wide, 1 / np.sqrt(np.abs(wide))]
        for column, value in enumerate(expected, start=11):
            rounded = value.astype(np.float32)
            rounded = np.where(np.abs(rounded) < 2.0**-126, np.copysign(0, rounded), rounded)
            assert np.array_equal(out[:, column], rounded), column


# ---- lanes, memory


def exchange_inputs(random: np.random.Generator) -> np.ndarray:
    return random.integers(1, 1 << 32, 32).astype(np.uint32)


def test_exchanges(cases: Simulator, random: np.random.Generator):
    v = exchange_inputs(random)
    out = cases.empty((32, 16), torch.int32)
    assert cases.call("wrapped_exchange", out, cases.upload(registers(v))) == 0
    lane = np.arange(32)
    group = lane // 8 * 8
    up, down = lane - 2, lane + 2
    expected = [
        v[lane ^ 5],
        v[lane * 7 % 32],
        v[np.where(lane < 3, lane, lane - 3)],
        v[np.where(lane > 28, lane, (lane + 3) % 32)],
        v[lane ^ 3],
        v[group + 3],
        v[np.where(up < group, lane, up)],
        v[np.where(down >= group + 8, lane, down % 32)],
        np.full(32, sum(int(x & 1) << i for i, x in enumerate(v))),
        np.full(32, 0b11),
        np.full(32, v.sum(dtype=np.uint32)),
        np.full(32, v.view(np.int32).min().astype(np.uint32)),
        np.full(32, v.max()),
        np.full(32, np.bitwise_and.reduce(v)),
        np.full(32, np.bitwise_or.reduce(v & 0xFF)),
        np.full(32, np.bitwise_xor.reduce(v)),
    ]
    result = out.tensor().numpy().view(np.uint32)
    for column, value in enumerate(expected):
        assert np.array_equal(result[:, column], value), column


def test_copies(cases: Simulator, random: np.random.Generator):
    x = random.integers(0, 1 << 32, 256).astype(np.uint32)
    out = cases.empty((448,), torch.int32)
    assert cases.call("wrapped_copy", out, cases.upload(registers(x))) == 0
    t = np.arange(64)
    other = t ^ 32
    four = np.where(t % 3 != 0, x[:64], 0).astype(np.uint32)
    eight = np.where((t % 5 != 0)[:, None], x[:128].reshape(64, 2), 0).astype(np.uint32)
    sixteen = np.where((t % 7 != 0)[:, None], x.reshape(64, 4), 0).astype(np.uint32)
    sums = four[other] + eight[other, 0] * np.uint32(3) + eight[other, 1] * np.uint32(5)
    vectors = sixteen[other].copy()
    vectors[:, 0] += x.reshape(64, 4)[:, 0]
    pairs = np.stack([x.reshape(64, 4)[:, 3], eight[other, 0]], 1)
    result = out.tensor().numpy().view(np.uint32)
    assert np.array_equal(result, np.concatenate([sums, vectors.ravel(), pairs.ravel()]))
    copied = sum(int((t % m != 0).sum()) * b for m, b in [(3, 4), (5, 8), (7, 16)])
    assert cases.counters().cp_async_bytes == copied


@pytest.mark.parametrize("seed", [0, 1])
def test_atomics(cases: Simulator, random: np.random.Generator, seed: int):
    cases.configure(seed=seed)
    x = random.integers(0, 1 << 32, 128).astype(np.uint32)
    start = np.zeros(136, np.uint32)
    start[2] = start[4] = 0xFFFFFFFF
    out, total = cases.upload(registers(start)), cases.upload(torch.zeros(1))
    assert cases.call("wrapped_atomic", out, total, cases.upload(registers(x))) == 0
    result = out.tensor().numpy().view(np.uint32)
    assert result[0] == x.sum(dtype=np.uint32)
    assert (result[1], result[2]) == (x.max(), x.min())
    assert result[3] == np.bitwise_or.reduce(x & 0xFF)
    assert result[4] == np.bitwise_and.reduce(x | 0xFF)
    assert result[5] == 128 % 100
    assert result[6].astype(np.int32) == max(0, x.view(np.int32).max())
    assert result[7] == 7
    assert np.array_equal(result[8:], x)
    assert total.tensor().item() == 32.0
    assert cases.counters().atomics == 128 * 10


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_named_barriers_and_three_dimensions(cases: Simulator, seed: int):
    cases.configure(seed=seed)
    out = cases.empty((12, 128), torch.int32)
    assert cases.call("wrapped_roles", out) == 0
    block, t = torch.arange(12)[:, None], torch.arange(32)[None]
    expected = torch.cat(
        [(63 - t) * 3 + block, (32 + t).expand(12, 32), (64 + t).expand(12, 32).repeat(1, 2)], 1
    )
    assert torch.equal(out.tensor(), expected.int())
