"""csrc/kernels/cuda/gemm_grad.cu against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from cuda_gemm import assert_no_bank_conflicts, call_gemm
from cuda_simulator import CUDA, Simulator, dtype_value, struct
from tolerance import assert_contraction

# tokens, rows, cols of out = op(x) W: around the tiles of 16, 64 and 128 tokens and 128 rows, and
# enough stages of 64 columns to reuse the ring; cols of input_grad are multiples of 8.
SHAPES = [
    (8, 128, 64),
    (16, 136, 448),
    (24, 64, 200),
    (64, 120, 264),
    (72, 128, 72),
    (136, 136, 328),
]


@dataclass
class Product:
    out: torch.Tensor
    reference: torch.Tensor
    plain: torch.Tensor
    split: bool

    def check(self) -> None:
        assert_contraction(self.out, self.reference, self.plain)


def run(
    sim: Simulator,
    rng: torch.Generator,
    shape: tuple[int, int, int],
    *,
    weight_grad: bool,
    add: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    multiprocessors: int = 4,
    padding: int = 0,
) -> Product:
    """out (+)= x W, or x^T W with `weight_grad`; rows of all lie `padding` apart."""
    tokens, rows, cols = shape
    x = torch.randn((cols, tokens) if weight_grad else (tokens, cols), generator=rng).bfloat16()
    weight = torch.randn((cols, rows), generator=rng).bfloat16()
    before = torch.randn((tokens, rows), generator=rng).to(out_dtype)

    def uploaded(tensor: torch.Tensor) -> int:
        return sim.upload(torch.nn.functional.pad(tensor, (0, padding))).pointer

    out = sim.empty((tokens, rows + padding), out_dtype)
    if add:
        out.upload(torch.nn.functional.pad(before, (0, padding), value=torch.nan))
    args = struct("GemmArgs")(
        out=out.pointer,
        x=uploaded(x),
        weight=uploaded(weight),
        tokens=tokens,
        rows=rows,
        cols=cols,
        out_stride=rows + padding,
        x_stride=x.shape[1] + padding,
        weight_stride=rows + padding,
        out_dtype=dtype_value(out_dtype),
        add=add,
    )
    name = "weight_grad" if weight_grad else "input_grad"
    plan = call_gemm(sim, name, args, multiprocessors)
    left = x.T if weight_grad else x
    reference, plain = left.double() @ weight.double(), left.float() @ weight.float()
    if add:
        reference, plain = reference + before.double(), plain + before.float()
    result = out.tensor()
    assert torch.isnan(result[:, rows:]).all(), "wrote beyond a row"
    return Product(result[:, :rows], reference, plain.to(out_dtype), bool(plan.split))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("multiprocessors", [1, 5])
def test_matches_reference(sim, rng, shape, weight_grad, multiprocessors):
    options = {"weight_grad": weight_grad, "multiprocessors": multiprocessors}
    run(sim, rng, shape, **options).check()


@pytest.mark.parametrize("cols", [1, 63, 65, 203])
def test_weight_gradients_of_any_number_of_tokens(sim, rng, cols):
    run(sim, rng, (40, 72, cols), weight_grad=True).check()


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padding", [0, 8])
def test_adds_to_out(sim, rng, weight_grad, add, out_dtype, padding):
    options = {"add": add, "out_dtype": out_dtype, "padding": padding}
    for multiprocessors in (1, 3):  # whole tiles, and tiles in parts
        options["multiprocessors"] = multiprocessors
        run(sim, rng, (24, 72, 136), weight_grad=weight_grad, **options).check()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_order_of_threads_does_not_matter(sim, rng, seed, weight_grad):
    results = []
    for order in (0, seed):
        sim.configure(seed=order)
        rng.manual_seed(7)
        results.append(run(sim, rng, (72, 200, 328), weight_grad=weight_grad))
    assert results[0].split and torch.equal(results[0].out, results[1].out)


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("tokens", [16, 64, 128])
def test_traffic(sim, rng, weight_grad, tokens):
    rows, cols = 256, 256
    run(sim, rng, (tokens, rows, cols), weight_grad=weight_grad, multiprocessors=1)
    counted = sim.counters()
    assert counted.load_bytes == 2 * (rows * cols + 2 * tokens * cols)  # x once per 128 rows
    assert counted.load_sectors == counted.load_sectors_needed
    assert counted.store_sectors == counted.store_sectors_needed == tokens * rows * 2 // 32
    assert counted.mma == tokens // 16 * rows // 8 * cols // 16
    assert_no_bank_conflicts(sim)


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("tokens", [8, 24])
def test_ptx_agrees(sim, rng, weight_grad, tokens):
    sim.compare_with_ptx(CUDA / "gemm_grad.cu", CUDA / "gemm_plan.cu")
    options = {"add": True, "multiprocessors": 3}
    assert run(sim, rng, (tokens, 136, 328), weight_grad=weight_grad, **options).split
