"""How fast a loaded model runs here, beside what this machine could do at best."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_native import _C
from qwen_native.llm import LLM

_WARM_UP_TOKENS = 16
_STEP_TOKENS = 512  # the engine reads this many prompt tokens a step


@dataclass(frozen=True)
class Measurement:
    """One measured case.

    Attributes:
        kind: "prefill" (from request to first token) or "decode".
        tokens: Prompt length of a prefill; tokens generated per sequence of a decode.
        depth: Tokens already in the cache of each sequence.
        batch: Sequences that run together.
        tokens_per_second: Median over the repeats, all sequences together.
        spread: (max - min) / median over the repeats.
        bandwidth_share: Bytes of weights and cache that one pass needs, per second, as a share of
            the measured read bandwidth.
        peak_share: Multiply-adds of the matrices and of attention (two operations each), per
            second, as a share of the measured matrix peak of the weights' format.
    """

    kind: str
    tokens: int
    depth: int
    batch: int
    tokens_per_second: float
    spread: float
    bandwidth_share: float
    peak_share: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)


class Benchmark:
    """Runs cases on one model.

    Args:
        llm: The model.
        repeats: How often each case is measured; the median counts.
    """

    def __init__(self, llm: LLM, repeats: int = 5) -> None:
        if llm.device != "cpu":
            raise ValueError(
                f"device is {llm.device!r}, expected 'cpu': GPUs are measured by tools/gpu_check.sh"
            )
        self.llm = llm
        self.repeats = repeats
        self.peaks: dict[str, Any] = _C.measure_peaks(llm.threads)

    def run(
        self,
        prompts: Sequence[int],
        gen: int,
        depths: Sequence[int],
        batches: Sequence[int],
        done: Callable[[Measurement], None] = lambda measurement: None,
    ) -> list[Measurement]:
        """Measure a prefill for each prompt length and a decode for each depth and batch.

        Raises:
            ValueError: a case does not fit into the model's context.
        """
        decodes = [depth + gen + _head_start(depth, max(batches, default=1)) for depth in depths]
        longest = max([*prompts, *decodes], default=0)
        if longest + 1 > self.llm.context:
            raise ValueError(
                f"the longest case has {longest + 1} tokens, "
                f"expected at most the context of {self.llm.context}"
            )
        measurements = []
        for measurement in self._cases(prompts, gen, depths, batches):
            measurements.append(measurement)
            done(measurement)
        return measurements

    def _cases(
        self, prompts: Sequence[int], gen: int, depths: Sequence[int], batches: Sequence[int]
    ) -> Iterator[Measurement]:
        self.decode_seconds(_WARM_UP_TOKENS, depth=1, batch=1)
        for tokens in prompts:
            times = [self.prefill_seconds(tokens) for _ in range(self.repeats)]
            yield self.measurement("prefill", tokens, 0, 1, times)
        if gen > 0:
            for depth in depths:
                for batch in batches:
                    times = [self.decode_seconds(gen, depth, batch) for _ in range(self.repeats)]
                    yield self.measurement("decode", gen, depth, batch, times)

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds from a request with `tokens` random tokens to its first token."""
        request = self._add(tokens, 1, seed=tokens)
        begin = time.perf_counter()
        while not self.llm._engine.step():
            pass
        seconds = time.perf_counter() - begin
        self.llm._engine.abort(request)
        return seconds

    def decode_seconds(self, tokens: int, depth: int, batch: int) -> float:
        """Seconds for `tokens` steps of `batch` sequences that start with `depth` in the cache."""
        engine = self.llm._engine
        # While the last prompts are read, the first sequences already decode; they may not finish.
        room = tokens + _head_start(depth, batch)
        requests = [self._add(max(depth, 1), room, seed=i) for i in range(batch)]
        waiting = set(requests)
        while waiting:
            waiting -= {emitted[0] for emitted in engine.step()}
        begin = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        seconds = time.perf_counter() - begin
        for request in requests:
            engine.abort(request)
        return seconds

    def _add(self, tokens: int, max_new_tokens: int, seed: int) -> int:
        ids = np.random.default_rng(seed).integers(0, self.llm.config.vocab_size, tokens).tolist()
        sampling = _C.SamplingParams(temperature=0.0)
        request: int = self.llm._engine.add(
            ids, sampling, max_new_tokens=max_new_tokens, stop_ids=[]
        )
        return request

    def measurement(
        self,
        kind: str,
        tokens: int,
        depth: int,
        batch: int,
        times: list[float],
        read_bandwidths: list[float] | None = None,
    ) -> Measurement:
        """What the times of one case say beside the machine's peaks.

        Args:
            read_bandwidths: Bytes per second that memory gave when each of `times` was taken; on a
                machine that is shared it changes within seconds. Default: the one of `peaks`.
        """
        total = tokens * batch
        seconds = statistics.median(times)
        steps = 1 if kind == "prefill" else tokens
        mean_depth = depth + tokens / 2
        bytes_read = steps * self.weight_bytes() + (
            steps * batch * mean_depth * self.llm.kv_bytes_per_token if kind == "decode" else 0
        )
        head_rows = 1 if kind == "prefill" else total
        operations: float = 2 * total * self._layer_weights() + 2 * head_rows * self._head_weights()
        bandwidths = read_bandwidths or [self.peaks["read_bandwidth"]] * len(times)
        c = self.llm.config
        operations += total * mean_depth * 4 * c.num_layers * c.num_heads * c.head_dim
        return Measurement(
            kind,
            tokens,
            depth,
            batch,
            total / seconds,
            (max(times) - min(times)) / seconds,
            statistics.median(
                bytes_read / t / bandwidth for t, bandwidth in zip(times, bandwidths, strict=True)
            ),
            operations / seconds / self._matrix_peak(),
        )

    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads; an embedding that is not tied is not among them."""
        total: int = self.llm.model.weight_bytes
        if self.llm.config.tie_word_embeddings:
            return total
        return (
            total
            * (self._layer_weights() + self._head_weights())
            // (self._layer_weights() + 2 * self._head_weights())
        )

    def _layer_weights(self) -> int:
        c = self.llm.config
        attention = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
        return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)

    def _head_weights(self) -> int:
        return self.llm.config.vocab_size * self.llm.config.hidden_size

    def _matrix_peak(self) -> float:
        """Peak of the instructions that the weights' main format can use at this level."""
        formats = self.llm.model.bytes_by_format
        main = max(formats, key=lambda name: formats[name][0])
        wanted = {"f32": ["fma_f32"], "bf16": ["tile_bf16", "dot_bf16", "fma_f32"]}.get(
            main, ["tile_int8", "dot_int8", "fma_f32"]
        )
        return next(float(self.peaks[name]) for name in wanted if self.peaks[name] > 0)


def _head_start(depth: int, batch: int) -> int:
    """Steps that reading the prompts of a batch takes, and two to spare."""
    return batch * (depth // _STEP_TOKENS + 1) + 2
