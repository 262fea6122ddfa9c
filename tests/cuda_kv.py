"""The paged KV cache of the CUDA kernels' tests, laid out as KvPages in kernels.h says."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from cuda_simulator import Buffer, Simulator, struct


@dataclass
class PagedCache:
    """`pages` pages that hold nothing but 0xff (NaN) until rows are stored."""

    pages: int
    page_shift: int
    num_kv_heads: int
    head_dim: int
    bits: int

    def __post_init__(self) -> None:
        self.page_tokens = 1 << self.page_shift
        self.row_bytes = self.head_dim * self.bits // 8
        self.head_bytes = self.page_tokens * (2 * self.row_bytes + (8 if self.bits == 8 else 0))
        shape = (self.pages, self.num_kv_heads, self.head_bytes)
        self.content = torch.full(shape, 0xFF, dtype=torch.uint8)

    def _places(self, slot: int, is_value: bool) -> tuple[int, int, int]:
        """Page, first byte of the row, first byte of its scale."""
        page, row = divmod(slot, self.page_tokens)
        index = row + (self.page_tokens if is_value else 0)
        return page, index * self.row_bytes, 2 * self.page_tokens * self.row_bytes + 4 * index

    def store(self, slots: torch.Tensor, is_value: bool, rows: torch.Tensor) -> torch.Tensor:
        """Puts rows [tokens, num_kv_heads, head_dim]; returns them as the cache has them."""
        tokens = len(slots)
        if self.bits == 16:
            stored, value = rows.bfloat16(), rows.bfloat16().double()
            scales = None
        else:
            scales = (rows.float().abs().amax(-1, keepdim=True) / 127).contiguous()
            stored = torch.round(rows.float() / scales).to(torch.int8)
            value = stored.double() * scales.double()
        raw = stored.contiguous().view(torch.uint8).view(tokens, self.num_kv_heads, -1)
        for token, slot in enumerate(slots.tolist()):
            page, begin, scale_begin = self._places(slot, is_value)
            self.content[page, :, begin : begin + self.row_bytes] = raw[token]
            if scales is not None:
                self.content[page, :, scale_begin : scale_begin + 4] = scales[token].view(
                    torch.uint8
                )
        return value

    def load(self, slot: int, is_value: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(rows bf16 or int8, scales) of one token."""
        page, begin, scale_begin = self._places(slot, is_value)
        raw = self.content[page, :, begin : begin + self.row_bytes].contiguous()
        if self.bits == 16:
            return raw.view(torch.bfloat16), None
        scales = self.content[page, :, scale_begin : scale_begin + 4].contiguous()
        return raw.view(torch.int8), scales.view(torch.float32)

    def on(self, sim: Simulator) -> tuple[Buffer, object]:
        """The uploaded pages, and KvPages of them."""
        buffer = sim.upload(self.content)
        return buffer, struct("KvPages")(
            base=buffer.pointer,
            page_stride=self.num_kv_heads * self.head_bytes,
            page_shift=self.page_shift,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            bits=self.bits,
        )


@dataclass
class Attention:
    """One call of an attention launcher and what it should give."""

    out: torch.Tensor
    reference: torch.Tensor  # float64
    plain: torch.Tensor  # torch: float32 scores, probabilities and output rounded to bf16
    minimum_bytes: int  # keys, values, q and out once


def run_attention(
    sim: Simulator,
    rng: torch.Generator,
    kv_lens: list[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    query_lens: list[int] | None = None,
    bits: int = 16,
    window: int = 0,
    page_shift: int = 4,
    scale: float | None = None,
    query_size: float = 1.0,
) -> Attention:
    """query_lens None: attention_decode, else attention_prefill. Keys, values and queries of a
    sequence are random and depend on its lengths alone; the order of its pages comes from `rng`."""
    lens = query_lens if query_lens is not None else [1] * len(kv_lens)
    tokens, scale = sum(lens), head_dim**-0.5 if scale is None else scale
    page_tokens = 1 << page_shift
    needed = [-(-n // page_tokens) for n in kv_lens]
    cache = PagedCache(sum(needed) + 1, page_shift, num_kv_heads, head_dim, bits)
    order = torch.randperm(cache.pages, generator=rng).int()
    table = torch.full((len(kv_lens), max(needed) + 1), -1, dtype=torch.int32)
    q = torch.empty((tokens, num_heads, head_dim), dtype=torch.bfloat16)
    reference = torch.zeros(q.shape, dtype=torch.float64)
    plain = torch.zeros_like(q)
    begins = [sum(lens[:s]) for s in range(len(lens) + 1)]
    seen = 0
    for s, kv_len in enumerate(kv_lens):
        first_page = sum(needed[:s])
        table[s, : needed[s]] = order[first_page : first_page + needed[s]]
        own = torch.Generator().manual_seed(1000 * lens[s] + kv_len)
        rows = torch.randn((2, kv_len, num_kv_heads, head_dim), generator=own).bfloat16()
        mine = slice(begins[s], begins[s + 1])
        q[mine] = torch.randn((lens[s], num_heads, head_dim), generator=own) * query_size
        token = torch.arange(kv_len)
        slots = table[s, token // page_tokens] * page_tokens + token % page_tokens
        values = torch.stack([cache.store(slots, i == 1, rows[i]) for i in range(2)])
        position = torch.arange(kv_len - lens[s], kv_len)[:, None]
        key = torch.arange(kv_len)[None]
        visible = (key <= position) & ((key > position - window) | (window == 0))
        seen += int(visible.any(0).sum())
        for head in range(num_heads):
            keys, vals = values[:, :, head // (num_heads // num_kv_heads)]
            scores = (q[mine, head].double() @ keys.T) * scale
            reference[mine, head] = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ vals
            scores32 = (q[mine, head].float() @ keys.float().T) * scale
            shares = scores32.masked_fill(~visible, -torch.inf).softmax(-1).bfloat16()
            plain[mine, head] = (shares.float() @ vals.float()).bfloat16()
    pages, kv = cache.on(sim)
    out = sim.empty(q.shape, torch.bfloat16)
    args = struct("PagedAttentionArgs")(
        out=out.pointer,
        q=sim.upload(q).pointer,
        page_table=sim.upload(table).pointer,
        query_begin=sim.upload(torch.tensor(begins, dtype=torch.int32)).pointer,
        kv_len=sim.upload(torch.tensor(kv_lens, dtype=torch.int32)).pointer,
        q_stride=num_heads * head_dim,
        out_stride=num_heads * head_dim,
        sequences=len(kv_lens),
        page_table_stride=table.shape[1],
        max_query_len=max(lens, default=0),
        max_kv_len=max(kv_lens, default=0),
        num_heads=num_heads,
        window=window,
        scale=scale,
        kv=kv,
    )
    if query_lens is None:
        workspace = sim.library.qn_cuda_attention_decode_workspace
        workspace.restype = ctypes.c_int64
        if size := workspace(ctypes.byref(args)):
            args.workspace = sim.empty((size // 4,), torch.float32).pointer
        assert sim.call("qn_cuda_attention_decode", args) == 0
    else:
        assert sim.call("qn_cuda_attention_prefill", args) == 0
    row_bytes = 2 * cache.row_bytes + (8 if bits == 8 else 0)
    minimum = seen * num_kv_heads * row_bytes + 2 * 2 * q.numel()
    assert torch.equal(pages.tensor(), cache.content)
    return Attention(out.tensor(), reference, plain, minimum)
