"""The native engine (python/*.cpp). Arrays are numpy arrays or DLPack CPU tensors, never copied."""

from typing import Any, TypeAlias

Array: TypeAlias = Any  # f32, bf16 or i32; results are written to `out`

__version__: str

def host_isa() -> str:
    """Return the highest level that this host can run."""

def active_isa() -> str:
    """Return the level in use."""

def set_isa(name: str) -> None:
    """Switch the process to a level; not while ops run."""

def built_isas() -> list[str]:
    """Return the levels compiled into this library, lowest first."""

def kernel_sources() -> dict[str, str]:
    """Return, for every kernel, the level that provides it at the active level."""

def thread_budget() -> dict[str, int]:
    """Return affinity, cores, quota, override (0 = none) and the threads decided from them."""

def set_op_threads(threads: int) -> None:
    """Set the number of threads of the functions below; engines have their own."""

def op_threads() -> int:
    """Return the number of threads of the functions below."""

def measure_peaks(threads: int, read_bytes: int = 0) -> dict[str, Any]:
    """Measure the machine's ceilings at the active level, in bytes or operations per second."""

def rms_norm(
    out: Array, x: Array, weight: Array, eps: float, residual: Array | None, /
) -> None: ...
def rope(x: Array, cos: Array, sin: Array, /) -> None: ...
def swiglu(out: Array, gate: Array, up: Array, /) -> None: ...
def gather(out: Array, ids: Array, table: Array, /) -> None: ...
def argmax(x: Array, /) -> int: ...
def log_sum_exp(x: Array, /) -> float: ...

class LinearSegment:
    """One weight of a linear layer; its result starts at column `out_offset` of out."""

    def __init__(self, weight: Array, bias: Array | None, out_offset: int, /) -> None: ...

def linear(
    out: Array, x: Array, segments: list[LinearSegment], add: bool, invariant: bool, /
) -> None: ...
