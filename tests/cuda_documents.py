"""Inputs, calls and references of the tests of training's attention on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cuda_simulator import Buffer, Simulator, struct
from torch import Tensor


def _width(tensor: Tensor) -> int:
    return tensor.shape[1:].numel()


@dataclass
class Documents:
    """Random documents on the simulated device; rows of all tensors lie `padding` apart."""

    sim: Simulator
    lengths: Sequence[int]
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    window: int
    scale: float
    padding: int

    @classmethod
    def random(
        cls,
        sim: Simulator,
        rng: torch.Generator,
        lengths: Sequence[int],
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int = 0,
        query_size: float = 1.0,
        padding: int = 0,
    ) -> Documents:
        tokens = sum(lengths)

        def random(count: int) -> Tensor:
            return torch.randn((tokens, count, head_dim), generator=rng).bfloat16()

        q, k, v, dout = (random(n) for n in (heads, kv_heads, kv_heads, heads))
        scale = head_dim**-0.5
        return cls(sim, lengths, q * query_size, k, v, dout, window, scale, padding)

    @property
    def ends(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def _uploaded(self, tensor: Tensor) -> Buffer:
        return self.sim.upload(torch.nn.functional.pad(tensor.flatten(1), (0, self.padding)))

    def _empty(self, like: Tensor) -> Buffer:
        return self.sim.empty((len(like), _width(like) + self.padding), torch.bfloat16)

    def _result(self, buffer: Buffer, like: Tensor) -> Tensor:
        rows = buffer.tensor()
        width = _width(like)
        assert torch.isnan(rows[:, width:]).all(), "wrote beyond a row"
        return rows[:, :width].reshape(like.shape)

    def _args(self, **pointers: Buffer | None) -> object:
        tensors = {"out": self.q, "dout": self.q, "dq": self.q, "q": self.q}
        tensors |= dict.fromkeys(("k", "v", "dk", "dv"), self.k)
        return struct("DocumentAttentionArgs")(
            **{name: buffer.pointer for name, buffer in pointers.items() if buffer},
            **{f"{n}_stride": _width(t) + self.padding for n, t in tensors.items()},
            q=self._uploaded(self.q).pointer,
            k=self._uploaded(self.k).pointer,
            v=self._uploaded(self.v).pointer,
            begins=self.sim.upload(self.ends).pointer,
            tokens=len(self.q),
            documents=len(self.lengths),
            max_length=max(self.lengths, default=0),
            num_heads=self.q.shape[1],
            num_kv_heads=self.k.shape[1],
            head_dim=self.q.shape[2],
            window=self.window,
            scale=self.scale,
        )

    def forward(self, with_lse: bool = True) -> tuple[Tensor, Tensor]:
        """(out, lse)."""
        out = self._empty(self.q)
        lse = self.sim.empty((self.q.shape[1], len(self.q)), torch.float32)
        args = self._args(out=out, lse=lse if with_lse else None)
        assert self.sim.call("qn_cuda_packed_attention", args) == 0
        return self._result(out, self.q), lse.tensor()

    def backward(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        grads = [self._empty(x) for x in (self.q, self.k, self.v)]
        args = self._args(
            out=self._uploaded(out),
            lse=self.sim.upload(lse),
            dout=self._uploaded(self.dout),
            delta=self.sim.empty(lse.shape, torch.float32),
            **dict(zip(("dq", "dk", "dv"), grads, strict=True)),
        )
        assert self.sim.call("qn_cuda_packed_attention_bwd", args) == 0
        dq, dk, dv = (
            self._result(g, x) for g, x in zip(grads, (self.q, self.k, self.v), strict=True)
        )
        return dq, dk, dv

    def _scores(self, q: Tensor, k: Tensor, begin: int, end: int) -> Tensor:
        """[heads, length, length], -inf where a query does not look."""
        keys = k[begin:end].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1)
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (distance < 0) | ((distance >= self.window) & (self.window > 0))
        scores = q[begin:end].transpose(0, 1) @ keys.transpose(1, 2) * self.scale
        return scores.masked_fill(hidden, float("-inf"))

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As transformers computes it: scores and probabilities in the tensors' dtype."""
        outputs = []
        for begin, end in zip(self.ends[:-1].tolist(), self.ends[1:].tolist(), strict=True):
            values = v[begin:end].repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)
            wide = torch.promote_types(q.dtype, torch.float32)
            probs = self._scores(q, k, begin, end).to(wide).softmax(-1).to(q.dtype)
            outputs.append((probs @ values).transpose(0, 1))
        return torch.cat(outputs)

    def log_sum_exp(self) -> Tensor:
        """[heads, tokens] in float64, base 2."""
        q, k = self.q.double(), self.k.double()
        pairs = zip(self.ends[:-1].tolist(), self.ends[1:].tolist(), strict=True)
        parts = [self._scores(q, k, begin, end).logsumexp(-1) for begin, end in pairs]
        return torch.cat(parts, 1) / torch.tensor(2.0, dtype=torch.float64).log()
