"""Time every op at the sizes of real models, against the machine's peaks and against torch."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness  # noqa: E402
import numpy as np  # noqa: E402
import quant_reference  # noqa: E402
import torch  # noqa: E402
from gguf_blocks import block, decoded, random_tensor  # noqa: E402
from gradients import assert_gradients, gradients  # noqa: E402
from harness import Case, Run  # noqa: E402
from tolerance import assert_contraction, assert_pointwise  # noqa: E402

from qwen_native import ops, reference  # noqa: E402

HIDDEN, INTER = 3584, 18944  # Qwen2.5-7B


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def rms_norm_cases() -> Iterator[Case]:
    def make(tokens: int, dtype: torch.dtype) -> Run:
        x, weight = torch.randn(tokens, HIDDEN).to(dtype), torch.randn(HIDDEN)

        def check(out: torch.Tensor) -> None:
            wide = x.double()
            ref = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
            assert_pointwise(out, ref, plain())

        def plain() -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (HIDDEN,), weight.to(dtype), 1e-6)

        return Run(lambda: ops.rms_norm(x, weight), plain, check)

    for tokens in (1, 512):
        for dtype in (torch.float32, torch.bfloat16):
            size = 2 * tokens * HIDDEN * dtype.itemsize + 4 * HIDDEN
            yield Case(
                "rms_norm",
                f"{tokens}x{HIDDEN} {_name(dtype)}",
                lambda t=tokens, d=dtype: make(t, d),
                size,
            )


def linear_float_cases() -> Iterator[Case]:
    def make(tokens: int, rows: int, cols: int, dtype: torch.dtype) -> Run:
        x, weight = torch.randn(tokens, cols), torch.randn(rows, cols).to(dtype)
        narrow = x.to(dtype)

        def check(out: torch.Tensor) -> None:
            assert_contraction(out, x.double() @ weight.double().T, plain().float())

        def plain() -> torch.Tensor:
            return torch.nn.functional.linear(narrow, weight)

        return Run(lambda: ops.linear(x, weight), plain, check)

    shapes = [
        (9728, 896),
        (896, 4864),
        (11008, 2048),
    ]  # Qwen2.5-0.5B gate + up, down; 1.8B gate + up
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 16, 512):
            for rows, cols in shapes:
                yield Case(
                    "linear",
                    f"tokens={tokens} {rows}x{cols} {_name(dtype)}",
                    lambda t=tokens, r=rows, c=cols, d=dtype: make(t, r, c, d),
                    rows * cols * dtype.itemsize + 4 * tokens * (rows + cols),
                    2 * tokens * rows * cols,
                    "read_bandwidth"
                    if tokens == 1
                    else ("fma_f32" if dtype == torch.float32 else "tile_bf16"),
                )


def linear_quantized_cases() -> Iterator[Case]:
    def make(tokens: int, rows: int, cols: int, fmt: str) -> Run:
        x, values = torch.randn(tokens, cols), torch.randn(rows, cols)
        data = quant_reference.pack(fmt, quant_reference.quantize(fmt, values.numpy()))
        weight = ops.PackedWeight(data, fmt, rows, cols)
        narrow, torch_weight = x.bfloat16(), values.bfloat16()

        def check(out: torch.Tensor) -> None:
            ref = x.double() @ torch.from_numpy(ops.unpack_weight(weight)).double().T
            relative = ((out - ref).square().mean() / ref.square().mean()).sqrt().item()
            # Gaussian x rounded to steps of max / 127, max = 3.3 sigma of 1024: 3.3 / 127 / 12^0.5
            # = 0.0075; weights folded to int8 as much again; twice the root of both squares.
            assert relative <= 0.022, f"relative error {relative:.4f}, limit 0.022"

        def plain() -> torch.Tensor:
            return torch.nn.functional.linear(narrow, torch_weight)

        return Run(lambda: ops.linear(x, weight), plain, check)

    shapes = [(9728, 896), (896, 4864)]  # Qwen2.5-0.5B gate + up, down
    for fmt in quant_reference.FORMATS:
        for tokens in (1, 4, 16, 512):
            for rows, cols in shapes:
                yield Case(
                    "linear",
                    f"tokens={tokens} {rows}x{cols} {fmt}",
                    lambda t=tokens, r=rows, c=cols, f=fmt: make(t, r, c, f),
                    quant_reference.packed_bytes(fmt, rows, cols) + 4 * tokens * (rows + cols),
                    2 * tokens * rows * cols,
                    "read_bandwidth" if tokens <= 4 else "tile_int8",
                )


def mlp_cases() -> Iterator[Case]:
    """Qwen2.5-0.5B's MLP; one row takes the exact arithmetic, many the folded one."""
    hidden, inter = 896, 4864

    def make(tokens: int, fmt: str) -> Run:
        x = torch.randn(tokens, hidden)
        shapes = [(inter, hidden), (inter, hidden), (hidden, inter)]
        values = [torch.randn(shape) * shape[1] ** -0.5 for shape in shapes]
        packed = []
        for matrix, shape in zip(values, shapes, strict=True):
            data = quant_reference.pack(fmt, quant_reference.quantize(fmt, matrix.numpy()))
            packed.append(ops.PackedWeight(data, fmt, *shape))
        out = torch.zeros(tokens, hidden)
        narrow = [matrix.bfloat16() for matrix in values]

        def native() -> torch.Tensor:
            return ops.mlp(out.zero_(), x, *packed)

        def check(result: torch.Tensor) -> None:
            gate, up, down = (torch.from_numpy(ops.unpack_weight(p)).double() for p in packed)
            wide = x.double()
            ref = (torch.nn.functional.silu(wide @ gate.T) * (wide @ up.T)) @ down.T
            relative = ((result - ref).square().mean() / ref.square().mean()).sqrt().item()
            assert relative <= 0.03, f"relative error {relative:.4f}, limit 0.03"

        def plain() -> torch.Tensor:
            gate, up, down = narrow
            inner = torch.nn.functional.silu(x.bfloat16() @ gate.T) * (x.bfloat16() @ up.T)
            return inner @ down.T

        return Run(native, plain, check)

    for fmt in quant_reference.FORMATS:
        for tokens in (1, 16, 512):
            yield Case(
                "mlp",
                f"tokens={tokens} {hidden}x{inter} {fmt}",
                lambda t=tokens, f=fmt: make(t, f),
                3 * quant_reference.packed_bytes(fmt, inter, hidden) + 8 * tokens * hidden,
                6 * tokens * hidden * inter,
                "read_bandwidth" if tokens == 1 else "tile_int8",
            )


def quantize_cases() -> Iterator[Case]:
    """Loading: a checkpoint's blocks to the engine's formats."""

    def make(source: str, rows: int, cols: int, fmt: str) -> Run:
        data = random_tensor(source, rows, cols, np.random.default_rng(1))
        values = decoded(data, source, rows, cols).astype(np.float64)

        def check(packed: ops.PackedWeight) -> None:
            wide = quant_reference.decode(fmt, packed.data, rows, cols)
            relative = np.sqrt(np.square(wide - values).sum() / np.square(values).sum())
            # tests/kernels/test_quantize.py derives these; uniform codes are easier than Gaussian.
            limit = {
                "int8": 0.01,  # steps of the largest of 4864, up to 4.5 / 127, over 12^0.5
                "int8_grouped": 0.006,
                "int4_symmetric": 0.083,
                "int4": 0.072,
            }[fmt]
            assert relative <= limit, f"relative error {relative:.4f}, limit {limit}"

        return Run(lambda: ops.pack_weight(data, source, (rows, cols), fmt), None, check)

    rows, cols = 896, 4864  # Qwen2.5-0.5B down
    for source, fmt in (
        *((source, "int8_grouped") for source in ("Q8_0", "Q5_0", "Q6_K", "Q4_K", "BF16")),
        *(("Q8_0", "int8"), ("Q4_K", "int8"), ("BF16", "int8")),
        *(("Q4_0", "int4_symmetric"), ("BF16", "int4_symmetric"), ("BF16", "int4")),
    ):
        elements, size = block(source)
        bytes_read = rows * cols // elements * size
        yield Case(
            "quantize",
            f"{rows}x{cols} {source} to {fmt}",
            lambda s=source, f=fmt: make(s, rows, cols, f),
            bytes_read + quant_reference.packed_bytes(fmt, rows, cols),
        )


def _cached_attention(
    queries: int, depth: int, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ops.KvPages, ops.SequenceSpan]:
    """q, k, v and the filled cache of one layer of Qwen2.5-0.5B."""
    heads, kv_heads, head_dim, page_tokens = 14, 2, 64, 64
    q = torch.randn(queries, heads, head_dim)
    k, v = torch.randn(2, depth, kv_heads, head_dim)
    count = -(-depth // page_tokens)
    words = ops.kv_page_bytes(page_tokens, kv_heads, head_dim, dtype) // 4
    pool = torch.zeros((count, words), dtype=torch.int32)
    pages = ops.KvPages(pool, page_tokens, kv_heads, head_dim, dtype)
    table = list(range(count))
    ops.kv_append(pages, k, v, [ops.SequenceSpan(0, depth, depth, table)])
    return q, k, v, pages, ops.SequenceSpan(0, queries, depth, table)


def rounded_to_int8(x: torch.Tensor) -> torch.Tensor:
    """What an int8 cache keeps of [..., head_dim]: 8 bits and a scale per token and head."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def attention_cases() -> Iterator[Case]:
    def make(queries: int, depth: int, dtype: str) -> Run:
        q, k, v, pages, span = _cached_attention(queries, depth, dtype)
        if dtype == "int8":  # judged by what the cache holds
            k, v = (rounded_to_int8(x) for x in (k, v))
        storage = torch.float32 if dtype == "f32" else torch.bfloat16
        mask = torch.ones(queries, depth, dtype=torch.bool).tril(depth - queries)
        # [heads, tokens, head_dim], the order that torch wants
        q2, k2, v2 = (x.to(storage).transpose(0, 1).contiguous() for x in (q, k, v))

        def plain() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q2[None], k2[None], v2[None], attn_mask=mask, enable_gqa=True
            )[0]

        # What the cache holds; int8 codes times their scales are not rounded to bf16.
        k3, v3 = (k, v) if dtype == "int8" else (k2.transpose(0, 1), v2.transpose(0, 1))

        def check(out: torch.Tensor) -> None:
            ref = torch.nn.functional.scaled_dot_product_attention(
                *(x.double().transpose(0, 1)[None] for x in (q, k3, v3)),
                attn_mask=mask,
                enable_gqa=True,
            )[0]
            assert_contraction(out.to(storage), ref.transpose(0, 1), plain().transpose(0, 1))

        return Run(lambda: ops.attention(q, pages, [span]), plain, check)

    for dtype in ("f32", "bf16", "int8"):
        cache = 4096 // 64 * ops.kv_page_bytes(64, 2, 64, dtype)
        yield Case(
            "attention", f"decode 4096 14/2x64 {dtype}", lambda d=dtype: make(1, 4096, d), cache
        )
        for tokens in (512, 2048):
            yield Case(
                "attention",
                f"prefill {tokens} 14/2x64 {dtype}",
                lambda t=tokens, d=dtype: make(t, t, d),
                cache * tokens // 4096,
                2 * 64 * 14 * tokens * (tokens + 1),
                "fma_f32" if dtype == "f32" else "tile_bf16",
            )


def kv_append_cases() -> Iterator[Case]:
    def make(tokens: int, dtype: str) -> Run:
        _, k, v, pages, span = _cached_attention(tokens, tokens, dtype)

        def check(_: None) -> None:
            """The cache has no reader but attention, whose cases check both."""

        return Run(lambda: ops.kv_append(pages, k, v, [span]), None, check)

    for dtype in ("f32", "bf16", "int8"):
        size = 512 * 2 * 2 * 64 * 4 + 512 // 64 * ops.kv_page_bytes(64, 2, 64, dtype)
        yield Case("kv_append", f"512 tokens 2x64 {dtype}", lambda d=dtype: make(512, d), size)


def rope_cases() -> Iterator[Case]:
    heads, head_dim = 28, 128

    def make(tokens: int, dtype: torch.dtype) -> Run:
        x = torch.randn(tokens, heads, head_dim).to(dtype)
        angle = torch.rand(tokens, head_dim // 2) * 6
        cos, sin = angle.cos(), angle.sin()

        def plain(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            low, high = x.to(cos.dtype).chunk(2, -1)
            c, s = cos[:, None], sin[:, None]
            return torch.cat([low * c - high * s, high * c + low * s], -1)

        before = x.clone()

        def check(out: torch.Tensor) -> None:
            base = plain(before, cos, sin).to(dtype)
            assert_contraction(out, plain(before, cos.double(), sin.double()), base)

        return Run(lambda: ops.rope(x, cos, sin), lambda: plain(x, cos, sin).to(dtype), check)

    for tokens in (1, 512):
        for dtype in (torch.float32, torch.bfloat16):
            size = tokens * (2 * heads * head_dim * dtype.itemsize + 4 * head_dim)
            label = f"{tokens}x{heads}x{head_dim} {_name(dtype)}"
            yield Case("rope", label, lambda t=tokens, d=dtype: make(t, d), size)


def swiglu_cases() -> Iterator[Case]:
    def make(tokens: int, dtype: torch.dtype) -> Run:
        gate, up = torch.randn(2, tokens, INTER).to(dtype)
        out = torch.empty_like(gate)

        def plain() -> torch.Tensor:
            return torch.nn.functional.silu(gate) * up

        def check(result: torch.Tensor) -> None:
            wide = gate.double()
            assert_pointwise(result, wide * torch.sigmoid(wide) * up.double(), plain())

        return Run(lambda: ops.swiglu(gate, up, out), plain, check)

    for tokens in (1, 512):
        for dtype in (torch.float32, torch.bfloat16):
            size = 3 * tokens * INTER * dtype.itemsize
            label = f"{tokens}x{INTER} {_name(dtype)}"
            yield Case("swiglu", label, lambda t=tokens, d=dtype: make(t, d), size)


def _backward(
    out: torch.Tensor, inputs: list[torch.Tensor], dout: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, ...]]:
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def rms_norm_bwd_cases() -> Iterator[Case]:
    def make(tokens: int, dtype: torch.dtype) -> Run:
        x, dy = torch.randn(2, tokens, HIDDEN).to(dtype)
        weight = torch.randn(HIDDEN).to(dtype)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        plain = _backward(torch.nn.functional.rms_norm(leaves[0], (HIDDEN,), leaves[1]), leaves, dy)

        def check(grads: tuple[torch.Tensor, ...]) -> None:
            wide = (x, weight)
            assert_gradients(grads, lambda x, w: reference.rms_norm(x, w, 1e-6), wide, dy)

        return Run(lambda: ops.rms_norm_bwd(dy, x, weight), plain, check)

    for dtype in (torch.float32, torch.bfloat16):
        size = 3 * 512 * HIDDEN * dtype.itemsize
        yield Case(
            "rms_norm_bwd", f"512x{HIDDEN} {_name(dtype)}", lambda d=dtype: make(512, d), size
        )


def swiglu_bwd_cases() -> Iterator[Case]:
    def make(tokens: int, dtype: torch.dtype) -> Run:
        gate, up, dout = torch.randn(3, tokens, INTER).to(dtype)
        leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        plain = _backward(torch.nn.functional.silu(leaves[0]) * leaves[1], leaves, dout)

        def check(grads: tuple[torch.Tensor, ...]) -> None:
            assert_gradients(grads, reference.swiglu, (gate, up), dout)

        return Run(lambda: ops.swiglu_bwd(dout, gate, up), plain, check)

    for dtype in (torch.float32, torch.bfloat16):
        size = 5 * 512 * INTER * dtype.itemsize
        yield Case("swiglu_bwd", f"512x{INTER} {_name(dtype)}", lambda d=dtype: make(512, d), size)


def softmax_xent_cases() -> Iterator[Case]:
    rows, vocab = 32, 151936

    def make(dtype: torch.dtype) -> Run:
        logits = (torch.randn(rows, vocab) * 3).to(dtype)
        targets = torch.randint(0, vocab, (rows,))
        native, narrow = logits.clone(), targets.int()
        grad = torch.full((rows,), -1.0)

        def plain() -> torch.Tensor:
            leaf = logits.clone().requires_grad_()
            loss = torch.nn.functional.cross_entropy(leaf.float(), targets, reduction="sum")
            return torch.autograd.grad(loss, leaf)[0]

        def check(_: torch.Tensor) -> None:
            out = logits.clone()
            ops.softmax_xent(out, narrow, 1.0, grad)
            ref = logits.double().softmax(-1)
            ref[torch.arange(rows), targets] -= 1
            assert_contraction(out, ref, plain(), 3.0)

        return Run(lambda: ops.softmax_xent(native, narrow, 1.0, grad), plain, check)

    for dtype in (torch.float32, torch.bfloat16):
        size = 2 * rows * vocab * dtype.itemsize
        yield Case("softmax_xent", f"{rows}x{vocab} {_name(dtype)}", lambda d=dtype: make(d), size)


def packed_attention_cases() -> Iterator[Case]:
    """One layer of Qwen2.5-0.5B on one document, forward and backward."""
    heads, kv_heads, head_dim = 14, 2, 64

    def make(tokens: int, dtype: torch.dtype, backward: bool) -> Run:
        q, dout = torch.randn(2, tokens, heads, head_dim).to(dtype)
        k, v = torch.randn(2, tokens, kv_heads, head_dim).to(dtype)
        ends, scale = torch.tensor([0, tokens], dtype=torch.int32), head_dim**-0.5
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
            return torch.nn.functional.scaled_dot_product_attention(
                *heads_first, is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)

        def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return reference.attention(q, k, v, ends, scale)

        def check(result: tuple[torch.Tensor, ...]) -> None:
            if not backward:
                ref = exact(*(x.double() for x in (q, k, v)))
                return assert_contraction(result[0], ref, attend(q, k, v))
            ref = gradients(exact, [x.double() for x in (q, k, v)], dout.double())
            for grad, wide, base in zip(result, ref, plain(), strict=True):
                assert_contraction(grad, wide, base, 3.0)

        if not backward:
            return Run(
                lambda: ops.packed_attention(q, k, v, ends, scale), lambda: attend(q, k, v), check
            )
        plain = _backward(attend(*leaves), leaves, dout)
        out, lse = ops.packed_attention(q, k, v, ends, scale)
        return Run(
            lambda: ops.packed_attention_bwd(dout, q, k, v, out, lse, ends, scale), plain, check
        )

    for dtype in (torch.float32, torch.bfloat16):
        for backward in (False, True):
            tokens = 1024
            products = 5 if backward else 2
            yield Case(
                "packed_attention",
                f"{'backward' if backward else 'forward'} {tokens} 14/2x64 {_name(dtype)}",
                lambda t=tokens, d=dtype, b=backward: make(t, d, b),
                (4 if backward else 2) * tokens * (heads + kv_heads) * head_dim * dtype.itemsize,
                products * heads * head_dim * tokens * (tokens + 1),
                "tile_bf16" if dtype == torch.bfloat16 else "fma_f32",
            )


def matmul_cases() -> Iterator[Case]:
    """The three products of Qwen2.5-0.5B's gate and up, and of its output matrix, in training."""
    if not ops.has_matmul():
        return

    def make(m: int, n: int, k: int, a_transposed: bool, b_transposed: bool) -> Run:
        a = torch.randn((k, m) if a_transposed else (m, k)).bfloat16()
        b = torch.randn((n, k) if b_transposed else (k, n)).bfloat16()
        left, right = a.T if a_transposed else a, b.T if b_transposed else b
        out = torch.empty(m, n).bfloat16()

        def native() -> torch.Tensor:
            return ops.matmul(a, b, a_transposed=a_transposed, b_transposed=b_transposed, out=out)

        def check(result: torch.Tensor) -> None:
            rows = slice(0, 64)
            ref = left[rows].double() @ right.double()
            assert_contraction(result[rows], ref, left[rows] @ right)

        return Run(native, lambda: left @ right, check)

    for name, m, n, k, a_transposed, b_transposed in (
        ("forward", 1024, 9728, 896, False, True),
        ("input gradient", 1024, 896, 9728, False, False),
        ("weight gradient", 9728, 896, 1024, True, False),
    ):
        yield Case(
            "matmul",
            f"{name} {m}x{n}x{k}",
            lambda s=(m, n, k), t=(a_transposed, b_transposed): make(*s, *t),
            2 * (m * k + k * n + m * n),
            2 * m * n * k,
            "tile_bf16",
        )


def squared_norm_cases() -> Iterator[Case]:
    n = 1 << 24

    def make() -> Run:
        x = torch.randn(n).bfloat16()

        def check(out: float) -> None:
            exact = x.double().square().sum()
            assert_contraction(torch.tensor([out]), exact[None], x.float().square().sum()[None])

        return Run(lambda: ops.squared_norm(x), lambda: x.float().square().sum(), check)

    yield Case("squared_norm", f"{n} elements bf16", make, 2 * n)


def adamw_cases() -> Iterator[Case]:
    n = 1 << 24

    def make() -> Run:
        master, mean = torch.randn(2, n)
        square, grad = torch.rand(n), torch.randn(n).bfloat16()
        narrow = master.bfloat16()
        parameter = master.clone().requires_grad_()
        parameter.grad = grad.float()
        optimiser = torch.optim.AdamW([parameter], 1e-5, fused=True)

        def check(_: None) -> None:
            state = [torch.ones(9), torch.zeros(9), torch.zeros(9)]
            ops.adamw(*state, torch.ones(9), step=1, rate=0.5)
            # mean / c1 = 1 and sqrt(square / c2) = 1 after one step.
            assert_pointwise(state[0], torch.full((9,), 0.5).double(), torch.full((9,), 0.5))

        def native() -> None:
            ops.adamw(master, mean, square, grad, narrow, step=2, rate=1e-5)

        return Run(native, optimiser.step, check)

    yield Case("adamw", f"{n} elements", make, 28 * n)


@functools.cache
def _encoded(fmt: str, rows: int, cols: int) -> np.ndarray:
    return quant_reference.encode(fmt, torch.randn(rows, cols).numpy())


def gather_cases() -> Iterator[Case]:
    rows, cols, tokens = 4096, HIDDEN, 512

    def make(fmt: str) -> Run:
        ids = torch.randint(0, rows, (tokens,), dtype=torch.int32)
        if fmt in ("f32", "bf16"):
            weight = torch.randn(rows, cols)
            table = weight if fmt == "f32" else weight.bfloat16()

            def check(out: torch.Tensor) -> None:
                assert torch.equal(out, table[ids.long()].float()), "rows differ"

            return Run(lambda: ops.gather(ids, table), lambda: table[ids].float(), check)
        data = _encoded(fmt, rows, cols).copy()
        packed = ops.PackedWeight(data, fmt, rows, cols)

        def check_packed(out: torch.Tensor) -> None:
            ref = torch.from_numpy(quant_reference.decode(fmt, data, rows, cols))[ids.long()]
            assert_contraction(out, ref, ref.float())

        return Run(lambda: ops.gather(ids, packed), None, check_packed)

    # Bytes that the layout makes the machine read: whole lines of the half panel.
    per_weight = {"f32": 4, "bf16": 2, "int8": 16, "int8_grouped": 16}
    per_weight |= {"int4_symmetric": 8, "int4": 8}
    for fmt, read in per_weight.items():
        size = tokens * cols * (read + 4)
        yield Case("gather", f"{tokens} of {rows}x{cols} {fmt}", lambda f=fmt: make(f), size)


def sampling_cases() -> Iterator[Case]:
    vocab = 151936

    def make_argmax() -> Run:
        x = torch.randn(vocab) * 3

        def check(index: int) -> None:
            assert index == int(x.argmax()), f"index {index}"

        return Run(lambda: ops.argmax(x), x.argmax, check)

    def make_log_sum_exp() -> Run:
        x = torch.randn(vocab) * 3

        def check(value: float) -> None:
            ref = torch.logsumexp(x.double(), 0).item()
            assert abs(value - ref) <= 2**-21, f"{value} instead of {ref}"

        return Run(lambda: ops.log_sum_exp(x), lambda: torch.logsumexp(x, 0), check)

    yield Case("argmax", f"{vocab} f32", make_argmax, 4 * vocab)
    yield Case("log_sum_exp", f"{vocab} f32", make_log_sum_exp, 4 * vocab)


CASES = [
    *linear_float_cases(),
    *rms_norm_cases(),
    *quantize_cases(),
    *attention_cases(),
    *kv_append_cases(),
    *rope_cases(),
    *swiglu_cases(),
    *rms_norm_bwd_cases(),
    *swiglu_bwd_cases(),
    *softmax_xent_cases(),
    *packed_attention_cases(),
    *matmul_cases(),
    *squared_norm_cases(),
    *adamw_cases(),
    *gather_cases(),
    *sampling_cases(),
    *linear_quantized_cases(),
    *mlp_cases(),
]


if __name__ == "__main__":
    sys.exit(harness.main(__doc__ or "", CASES))
