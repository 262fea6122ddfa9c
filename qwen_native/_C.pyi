"""The native engine (python/*.cpp). Arrays are numpy arrays or DLPack CPU tensors, never copied."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = Any  # f32, bf16 or i32; results are written to `out`

__version__: str

def host_isa() -> str:
    """Return the highest level that this host can run."""

def active_isa() -> str:
    """Return the level in use."""

def memory_streams() -> int:
    """Panels of weights that decoding walks side by side: 2 on AMD's processors, else 4."""

def set_memory_streams(count: int) -> None:
    """For tests and measurements; changes folded_tokens(), and so the result of 4-bit weights for
    a number of tokens that is folded with one count and not with the other, but no other result.

    Raises:
        ValueError: `count` is neither 2 nor 4.
    """

def folded_tokens() -> int:
    """From this many tokens on, `ops.linear` folds 4-bit weights unless it is `invariant`, at the
    levels above "scalar"."""

def set_isa(name: str) -> None:
    """Switch the process to a level; not while ops run."""

def built_isas() -> list[str]:
    """Return the levels compiled into this library, lowest first."""

def kernel_sources() -> dict[str, str]:
    """Return, for every kernel, the level that provides it at the active level."""

class Gpu:
    """Device 0 of a library of CUDA kernels."""

    def __init__(self, library: str) -> None: ...
    @staticmethod
    def count(library: str) -> int:
        """Return how many GPUs a library finds."""

    def info(self) -> dict[str, Any]:
        """Return name, capability, multiprocessors, free_bytes and total_bytes."""

def set_op_gpu(gpu: Gpu | None) -> None:
    """Set the GPU that ops of arrays on a GPU run on; None opens the first one when needed."""

def thread_budget() -> dict[str, int]:
    """Return affinity, cores, quota, override (0 = none) and the threads decided from them."""

def set_op_threads(threads: int) -> None:
    """Set the number of threads of the functions below; engines have their own."""

def keep_heap(reserve: int, /) -> bool: ...
def op_threads() -> int:
    """Return the number of threads of the functions below."""

def measure_peaks(threads: int, read_bytes: int = 0) -> dict[str, Any]:
    """Measure the machine's ceilings at the active level, in bytes or operations per second."""

def rms_norm(
    out: Array, x: Array, weight: Array, eps: float, residual: Array | None, /
) -> None: ...
def rope(x: Array, cos: Array, sin: Array, /) -> None: ...
def swiglu(out: Array, gate: Array, up: Array, /) -> None: ...
def rms_norm_bwd(
    dx: Array,
    dweight: Array,
    dy: Array,
    x: Array,
    weight: Array,
    eps: float,
    residual_grad: Array | None,
    /,
) -> None: ...
def swiglu_bwd(dgate: Array, dup: Array, dout: Array, gate: Array, up: Array, /) -> None: ...
def softmax_xent(
    log_prob: Array, logits: Array, targets: Array, scale: float, grad: Array | None, /
) -> None: ...
def packed_attention(
    out: Array,
    lse: Array,
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens: Array,
    scale: float,
    window: int,
    /,
) -> None: ...
def packed_attention_bwd(
    dq: Array,
    dk: Array,
    dv: Array,
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    cu_seqlens: Array,
    scale: float,
    window: int,
    /,
) -> None: ...
def has_matmul() -> bool: ...
def matmul(
    out: Array,
    a: Array,
    a_transposed: bool,
    b: Array,
    b_transposed: bool,
    bias: Array | None,
    add: bool,
    /,
) -> None: ...
def linear_xent(
    log_prob: Array,
    hidden: Array,
    weight: Array,
    targets: Array,
    scale: float,
    grad: Array | None,
    dhidden: Array | None,
    dweight: Array | None,
    chunk_tokens: int,
    /,
) -> None: ...
def squared_norm(x: Array, /) -> float: ...
def adamw(
    master: Array,
    mean: Array,
    square: Array,
    grad: Array,
    parameter: Array | None,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    /,
) -> None: ...
def mlp(out: Array, x: Array, gate: Array, up: Array, down: Array, invariant: bool, /) -> None: ...
def gather(out: Array, ids: Array, table: Array, /) -> None: ...
def argmax(x: Array, /) -> int: ...
def log_sum_exp(x: Array, /) -> float: ...

class PackedWeight:
    """A weight matrix in one of the engine's formats (csrc/kernels/quant_layout.h)."""

    def __init__(self, data: npt.NDArray[np.uint8], format: str, rows: int, cols: int) -> None: ...
    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def data(self) -> npt.NDArray[np.uint8]: ...

class GpuWeight:
    """A weight matrix in a GPU's layout (csrc/kernels/cuda/gemm_layout.h)."""

    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def data(self) -> Array: ...

def gpu_weight(data: Array, packed: Array, format: str, rows: int, cols: int, /) -> GpuWeight: ...
def gpu_weight_bytes(format: str, rows: int, cols: int, /) -> int:
    """Return the bytes of a weight in a GPU's layout."""

def pack_weight(
    data: npt.NDArray[np.uint8], source: str, rows: int, cols: int, format: str
) -> PackedWeight: ...
def decode_source(
    data: npt.NDArray[np.uint8], source: str, rows: int, cols: int
) -> npt.NDArray[np.float32]: ...
def unpack_weight(weight: PackedWeight, /) -> npt.NDArray[np.float32]: ...
def weight_bytes(format: str, rows: int, cols: int, /) -> int:
    """Return the bytes of a packed weight."""

def checksum(data: npt.NDArray[np.uint8]) -> int:
    """Return the 64-bit checksum of packed files (csrc/core/checksum.h)."""

def is_vector(name: str, /) -> bool:
    """Return whether a tensor (norm or bias) is held as plain float32 values."""

def chosen_format(weights: str, source: str, /) -> str:
    """Return the format that a matrix of type `source` gets when `weights` was asked for."""

class LinearSegment:
    """One weight of a linear layer; its result starts at column `out_offset` of out."""

    def __init__(self, weight: Array, bias: Array | None, out_offset: int, /) -> None: ...

def linear(
    out: Array, x: Array, segments: list[LinearSegment], add: bool, invariant: bool, /
) -> None: ...
def linear_w8a8(
    out: Array, x: Array, codes: Array, scales: Array, bias: Array | None, /
) -> None: ...

Span: TypeAlias = tuple[int, int, int, list[int]]  # query_begin, query_count, kv_len, page_table
# KvPages of ops.py: pool, page_tokens, num_kv_heads, head_dim, dtype, key_scale
Pages: TypeAlias = tuple[Array, int, int, int, str, Array | None]

def gpu_kv_page_bytes(page_tokens: int, num_kv_heads: int, head_dim: int, dtype: str, /) -> int: ...
def gpu_has_format(format: str, /) -> bool: ...
def kv_page_bytes(page_tokens: int, num_kv_heads: int, head_dim: int, dtype: str, /) -> int: ...
def kv_append(pages: Pages, k: Array, v: Array, spans: Sequence[Span], /) -> None: ...
def attention(
    out: Array,
    q: Array,
    pages: Pages,
    spans: Sequence[Span],
    scale: float,
    window: int,
    query_scale: Array | None,
    /,
) -> None: ...

class SamplingParams:
    """How one request turns logits into tokens (csrc/runtime/sampler.h)."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: list[tuple[int, float]] = ...,
        seed: int = 0,
        logprobs: int = -1,
    ) -> None: ...
    def validate(self, vocab: int, /) -> None: ...

class Sampler:
    """Sampling state of one request: what it has seen, and its random numbers."""

    def __init__(self, params: SamplingParams, prompt: list[int] = ...) -> None: ...
    def sample(self, logits: Array, /) -> tuple[int, float | None, list[tuple[int, float]], float]:
        """Return the token, its log-probability, alternatives, and that of the draw."""
    def distribution(self, logits: Array, /) -> list[tuple[int, float]]: ...
    @staticmethod
    def uniform(seed: int, index: int, /) -> float: ...

class Model:
    """A packed model, shared by engines."""

    @property
    def weight_bytes(self) -> int: ...
    @property
    def bytes_by_format(self) -> dict[str, tuple[int, int]]:
        """Return (weights, bytes) of the matrices in each format."""

class ModelBuilder:
    """Packs a checkpoint tensor by tensor."""

    def __init__(
        self,
        config: dict[str, Any],
        weights: str,
        invariant: bool,
        threads: int,
        gpu: Gpu | None = None,
    ) -> None: ...
    def add(
        self,
        name: str,
        type: str,
        shape: list[int],
        data: npt.NDArray[np.uint8],
        release: Callable[[int, int], None],
    ) -> None:
        """Take a tensor; `release` gets the byte ranges of `data` that are not needed any more."""

    def add_packed(
        self, name: str, format: str, shape: list[int], data: npt.NDArray[np.uint8]
    ) -> None:
        """Take a tensor in the engine's layout, 64-byte aligned, and use it where it lies."""

    def finish(self) -> Model: ...

class Engine:
    """Requests in, tokens out (csrc/runtime/engine.h)."""

    def __init__(
        self,
        model: Model,
        *,
        threads: int,
        context: int,
        cache_tokens: int,
        kv_dtype: str,
        max_step_tokens: int = 512,
        max_running: int = 256,
    ) -> None: ...
    def add(
        self,
        prompt: list[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        stop_ids: list[int],
        n: int = 1,
        speculate: bool = False,
    ) -> int: ...
    def abort(self, request: int, index: int | None = None) -> None: ...
    @property
    def has_work(self) -> bool: ...
    def step(
        self,
    ) -> list[tuple[int, int, int, float | None, list[tuple[int, float]], str | None, str, float]]:
        """Return the new tokens.

        Each is (request, index, token, logprob, alternatives, finish reason, error, log-probability
        of the draw); with the finish reason "error" there is no token.
        """
    def logits(
        self, tokens: list[int], last: int, prompt_length: int = 0
    ) -> npt.NDArray[np.float32]: ...
    def score(self, tokens: list[int], prompt_length: int = 0) -> npt.NDArray[np.float32]: ...
