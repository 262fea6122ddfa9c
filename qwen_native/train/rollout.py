"""Responses sampled by the native engine from the present weights of a torch model.

Token ids go in and come out; nothing is decoded and tokenised again. Weights never touch the disk:
matrices of the engine's type are used where the torch model has them, others are converted in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from qwen_native import _C
from qwen_native.nn import Qwen
from qwen_native.tensor_names import HF_QWEN, HF_QWEN2, expected_shapes
from qwen_native.tensor_source import TensorSource
from qwen_native.train.lora import merged_tensors
from qwen_native.train.metrics import available_memory

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_WEIGHTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The defaults are the report's (§3.2.2: top-p 0.9, two per query).

    Attributes:
        max_new_tokens: most tokens of a response, its end token included.
        top_p: keep the fewest tokens whose probabilities sum to at least this; 1 = all.
        temperature: divides the logits.
        n: responses to each prompt.
    """

    max_new_tokens: int = 256
    top_p: float = 0.9
    temperature: float = 1.0
    n: int = 2


@dataclass
class Response:
    """A sampled continuation of a prompt.

    Attributes:
        prompt: token ids.
        tokens: what was drawn, the end token included.
        log_probs: of each token under the model's own distribution, before temperature and top-p:
            what a trainer's log_softmax gives, and what ratios are formed with.
        drawn_log_probs: of each token under the distribution that it was drawn from.
        finish_reason: "stop" (the last token is an end token) or "length".
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    drawn_log_probs: list[float] = field(default_factory=list)
    finish_reason: str = ""


class NativePolicy:
    """A native engine over the weights that a torch model has now.

    Valid until the torch model's weights change: some of them are its memory, others (norms,
    biases, merged adapters) are copies. Make a new one for every round of rollouts; that takes
    milliseconds for a full model and one pass over the matrices for adapters.
    """

    def __init__(
        self,
        model: Qwen,
        *,
        context: int,
        weights: str | None = None,
        cache_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Hand the weights over, adapters merged in.

        Args:
            model: in float32 or bfloat16.
            context: most tokens of a prompt and its response together.
            weights: "f32", "bf16", "int8" or "int4"; None = the model's own type. With "f32" the KV
                cache is float32, too, and log-probabilities equal those of the float32 model.
            cache_tokens: room of the KV cache, which bounds how many responses grow at once; never
                more than half of the free memory takes, unless one response needs it.
            threads: default: the CPUs that this process may use.

        Raises:
            ValueError: the model has another type, or an option is out of range.
        """
        dtype = model.embedding.weight.dtype
        if dtype not in _TYPES:
            raise ValueError(f"the model is {dtype}, expected float32 or bfloat16")
        self.config = model.config
        weights = weights or _WEIGHTS[dtype]
        threads = threads or _C.thread_budget()["threads"]
        config = asdict(model.config)
        config["max_position_embeddings"] = model.config.context_length
        builder = _C.ModelBuilder(config, weights, True, threads)
        for tensor in _canonical(model):
            builder.add(tensor.name, tensor.dtype, list(tensor.shape), tensor.data, _keep)
        kv_dtype = "f32" if weights == "f32" else "bf16"
        shape = model.config
        width = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        affordable = available_memory() // 2 // (width * (4 if kv_dtype == "f32" else 2))
        self._engine = _C.Engine(
            builder.finish(),
            threads=threads,
            context=context,
            cache_tokens=max(context, min(cache_tokens or 16 * context, affordable)),
            kv_dtype=kv_dtype,
        )

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        seed: int,
    ) -> list[Response]:
        """Draw `sampling.n` responses to every prompt, those to one prompt next to each other.

        The same seed draws the same responses, whatever the threads.

        Args:
            prompts: token ids.
            sampling: how to draw.
            stop_ids: tokens that end a response.
            seed: of the random numbers.

        Raises:
            ValueError: a prompt is empty or too long, or an option is out of range.
            RuntimeError: the model gave logits that no token can be drawn from.
        """
        responses = [Response(list(prompt)) for prompt in prompts for _ in range(sampling.n)]
        places = {}
        for i, prompt in enumerate(prompts):
            params = _C.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=(seed * 0x9E3779B97F4A7C15 + i * sampling.n) % (1 << 63),
                logprobs=0,
            )
            request = self._engine.add(
                list(prompt),
                params,
                max_new_tokens=sampling.max_new_tokens,
                stop_ids=list(stop_ids),
                n=sampling.n,
            )
            places[request] = i * sampling.n
        while self._engine.has_work:
            for request, index, token, log_prob, _, finish, error, drawn in self._engine.step():
                response = responses[places[request] + index]
                if error:
                    raise RuntimeError(error)
                assert log_prob is not None
                response.tokens.append(token)
                response.log_probs.append(log_prob)
                response.drawn_log_probs.append(drawn)
                response.finish_reason = finish or ""
        return responses

    def score(self, tokens: Sequence[int]) -> Tensor:
        """The log-probability of every token but the first, given those before it: [n - 1]."""
        return torch.from_numpy(self._engine.score(list(tokens)))


def _keep(begin: int, end: int) -> None:
    """The tensors stay the torch model's: there is nothing to let go of."""


def _canonical(model: Qwen) -> Iterator[TensorSource]:
    """The model's weights under the engine's names, the original Qwen's fused ones in parts."""
    names = HF_QWEN if model.config.architecture == "qwen" else HF_QWEN2
    places: dict[str, list[tuple[str, int]]] = {}
    for canonical, shape in expected_shapes(model.config).items():
        places.setdefault(names.source(canonical)[0], []).append((canonical, shape[0]))
    for name, tensor in merged_tensors(model):
        data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        source = TensorSource(name, _TYPES[tensor.dtype], tuple(tensor.shape), data, None)
        begin = 0
        for canonical, rows in places[name]:
            yield source.rows(begin, begin + rows, canonical)
            begin += rows
