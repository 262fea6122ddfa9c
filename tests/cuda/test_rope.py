"""csrc/kernels/cuda/rope.cu against float64."""

from __future__ import annotations

import pytest
import torch
from cuda_kv import PagedCache
from cuda_simulator import CUDA, Simulator, struct
from tolerance import assert_contraction

EPS = 1e-6
POSITIONS = 40


class Rope:
    """Random inputs of one call, the call, and its float64 reference."""

    def __init__(
        self,
        rng: torch.Generator,
        tokens: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bits: int = 16,
        bias: bool = False,
        norm: bool = False,
        logn: bool = False,
        key_scale: bool = False,
        page_shift: int = 4,
        scale: float = 1.0,
    ) -> None:
        total = heads + 2 * kv_heads
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=rng)

        self.qkv = (random(tokens, total, head_dim) * scale).bfloat16()
        self.bias = random(total, head_dim).bfloat16() if bias else None
        self.q_norm = (random(head_dim) + 1).bfloat16() if norm else None
        self.k_norm = (random(head_dim) + 1).bfloat16() if norm else None
        angle = torch.rand((POSITIONS, head_dim // 2), generator=rng) * 6
        self.cos, self.sin = angle.cos(), angle.sin()
        self.positions = torch.randint(0, POSITIONS, (tokens,), generator=rng, dtype=torch.int32)
        self.query_scale = torch.rand(tokens, generator=rng) + 1 if logn else None
        half = torch.rand((kv_heads, head_dim // 2), generator=rng) * 4 + 1
        self.key_scale = torch.cat([half, half], -1) if key_scale else None
        pages = -(-tokens // (1 << page_shift)) + 2
        self.cache = PagedCache(pages, page_shift, kv_heads, head_dim, bits)
        slots = torch.randperm(pages << page_shift, generator=rng)[:tokens]
        self.slots = slots.to(torch.int32)

    def run(self, sim: Simulator, in_place: bool = False) -> torch.Tensor:
        tokens, total, head_dim = self.qkv.shape

        def pointer(tensor: torch.Tensor | None) -> int | None:
            return None if tensor is None else sim.upload(tensor).pointer

        qkv = sim.upload(self.qkv)
        q = qkv if in_place else sim.empty((tokens, self.heads, head_dim), torch.bfloat16)
        pages, kv = self.cache.on(sim)
        args = struct("RopeKvArgs")(
            q=q.pointer,
            qkv=qkv.pointer,
            bias=pointer(self.bias),
            q_norm=pointer(self.q_norm),
            k_norm=pointer(self.k_norm),
            cos=pointer(self.cos),
            sin=pointer(self.sin),
            positions=pointer(self.positions),
            query_scale=pointer(self.query_scale),
            key_scale=pointer(self.key_scale),
            slots=pointer(self.slots),
            tokens=tokens,
            q_stride=(total if in_place else self.heads) * head_dim,
            qkv_stride=total * head_dim,
            num_heads=self.heads,
            eps=EPS,
            kv=kv,
        )
        assert sim.call("qn_cuda_rope", args) == 0
        self.cache.content = pages.tensor()
        return q.tensor()[:, : self.heads]

    def reference(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.qkv.double()
        if self.bias is not None:
            x = x + self.bias.double()

        def normed(heads: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
            if weight is None:
                return heads
            scale = torch.rsqrt(heads.square().mean(-1, keepdim=True) + EPS)
            return heads * scale * weight.double()

        cos = self.cos[self.positions.long()].double()[:, None]
        sin = self.sin[self.positions.long()].double()[:, None]

        def rotated(heads: torch.Tensor) -> torch.Tensor:
            a, b = heads.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        q, k, v = x.split([self.heads, self.kv_heads, self.kv_heads], 1)
        q, k = rotated(normed(q, self.q_norm)), rotated(normed(k, self.k_norm))
        if self.query_scale is not None:
            q = q * self.query_scale.double()[:, None, None]
        if self.key_scale is not None:
            q = q * self.key_scale.double().repeat_interleave(self.heads // self.kv_heads, 0)
            k = k / self.key_scale.double()
        return q, k, v

    def check(self, q: torch.Tensor) -> None:
        """q and every written row; a rounding of the exact result is what torch would give."""
        expected_q, *expected_kv = self.reference()
        assert_contraction(q, expected_q, expected_q.bfloat16())
        written = 0
        for token, slot in enumerate(self.slots.tolist()):
            if slot < 0:
                continue
            for is_value, expected in enumerate(expected_kv):
                rows, scales = self.cache.load(slot, bool(is_value))
                if scales is None:
                    assert_contraction(rows, expected[token], expected[token].bfloat16())
                    continue
                largest = expected[token].abs().amax(-1, keepdim=True)
                assert torch.allclose(scales.double() * 127, largest, rtol=1e-5)
                # Half a step, and what float32 adds to the quotient of 127.
                error = (rows.double() * scales.double() - expected[token]).abs()
                assert (error <= 0.5001 * scales.double()).all()
            written += 1
        assert written == int((self.slots >= 0).sum())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [(4, 2), (14, 2), (5, 5), (20, 1)])
@pytest.mark.parametrize("bits", [16, 8])
def test_matches_reference(sim, rng, head_dim, heads, bits):
    rope = Rope(rng, 3, *heads, head_dim, bits=bits)
    rope.check(rope.run(sim))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("logn", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_switches(sim, rng, bias, norm, logn, in_place):
    rope = Rope(rng, 4, 8, 2, 64, bias=bias, norm=norm, logn=logn)
    rope.check(rope.run(sim, in_place))


@pytest.mark.parametrize("heads", [(6, 2), (20, 1), (5, 5)])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("bits", [16, 8])
def test_key_scale(sim, rng, heads, head_dim, bits):
    rope = Rope(rng, 3, *heads, head_dim, bits=bits, bias=True, logn=True, key_scale=True)
    rope.check(rope.run(sim))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bits", [16, 8])
def test_scale_of_the_input(sim, rng, scale, norm, bits):
    rope = Rope(rng, 2, 4, 2, 64, norm=norm, bits=bits, scale=scale)
    rope.check(rope.run(sim))


@pytest.mark.parametrize("page_shift", [4, 5, 8])
@pytest.mark.parametrize("bits", [16, 8])
def test_page_sizes(sim, rng, page_shift, bits):
    rope = Rope(rng, 35, 2, 2, 64, page_shift=page_shift, bits=bits)
    rope.check(rope.run(sim))


@pytest.mark.parametrize("bits", [16, 8])
def test_negative_slots_are_not_written(sim, rng, bits):
    rope = Rope(rng, 6, 4, 2, 64, bits=bits)
    rope.slots[::2] = -1
    rope.check(rope.run(sim))
    row_bytes = 2 * 2 * (64 * bits // 8 + (4 if bits == 8 else 0))
    assert (rope.cache.content != 0xFF).sum() <= 3 * row_bytes


def test_a_row_of_zeros_is_stored_as_zeros(sim, rng):
    rope = Rope(rng, 1, 2, 1, 64, bits=8)
    rope.qkv.zero_()
    rope.run(sim)
    rows, scales = rope.cache.load(int(rope.slots[0]), False)
    assert not rows.any() and not scales.any()


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("bits", [16, 8])
def test_order_of_threads_does_not_matter(sim, rng, seed, bits):
    rope = Rope(rng, 3, 14, 2, 128, norm=True, bits=bits)
    in_order, content = rope.run(sim), rope.cache.content
    rope.cache.content = torch.full_like(content, 0xFF)
    sim.configure(seed=seed)
    assert torch.equal(rope.run(sim), in_order) and torch.equal(rope.cache.content, content)


@pytest.mark.parametrize("norm", [False, True])
def test_traffic_is_within_5_percent(sim, rng, norm):
    tokens, heads, kv_heads, head_dim = 4, 32, 8, 128
    rope = Rope(rng, tokens, heads, kv_heads, head_dim, norm=norm)
    rope.check(rope.run(sim))
    counted = sim.counters()
    # qkv in; q, k and v out; a row of cos and of sin; the norm weights once.
    minimum = tokens * (heads + 2 * kv_heads) * head_dim * 2 * 2 + tokens * head_dim * 4
    minimum += 2 * head_dim * 2 if norm else 0
    assert counted.load_bytes + counted.store_bytes <= 1.05 * minimum
    assert counted.store_sectors == counted.store_sectors_needed


@pytest.mark.parametrize("bits", [16, 8])
def test_ptx_agrees(sim, rng, bits):
    rope = Rope(rng, 2, 6, 2, 80, bits=bits, bias=True, norm=True, logn=True, key_scale=True)
    sim.compare_with_ptx(CUDA / "rope.cu")
    rope.run(sim)
