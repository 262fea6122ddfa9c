"""Where a model runs: the CPU, a GPU, or its kernels under the SIMT executor (docs/CUDA.md)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qwen_native import _C

DEVICES = ("cpu", "cuda", "cuda-sim", "auto")


def cuda_library() -> Path:
    """Where the CUDA kernels lie when this build has them (`QN_CUDA=ON`)."""
    return Path(_C.__file__).parent / "libqn_cuda.so"


def open_device(device: str) -> tuple[str, _C.Gpu | None, list[str]]:
    """Open a device.

    Args:
        device: "cpu"; "cuda", the first GPU; "auto", a GPU when there is one, else the CPU;
            "cuda-sim", the CUDA kernels on this CPU, for tests: the environment variable
            QN_CUDA_SIM_LIBRARY names the library (`libqn_cuda_sim_fast.so`).

    Returns:
        The device that was chosen, its GPU (None: the CPU), and notices for the user.

    Raises:
        ValueError: There is no such device.
        RuntimeError: It cannot be used: not built, no GPU, or one older than sm_80.
    """
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    if device == "cpu":
        return device, None, []
    if device == "cuda-sim":
        library = os.environ.get("QN_CUDA_SIM_LIBRARY")
        if not library:
            raise RuntimeError(
                "device is 'cuda-sim', but QN_CUDA_SIM_LIBRARY is not set; expected the path of "
                "libqn_cuda_sim_fast.so of a build with -DQN_CUDA_SIM=ON"
            )
        return device, _C.Gpu(library), []
    if device == "cuda":
        if not cuda_library().is_file():
            raise RuntimeError(
                "device is 'cuda', but this build has no CUDA kernels; expected one made with "
                "QN_CMAKE_ARGS=-DQN_CUDA=ON (docs/CUDA.md)"
            )
        return device, _C.Gpu(str(cuda_library())), []
    if not cuda_library().is_file():
        return "cpu", None, ["device 'auto' is the CPU: this build has no CUDA kernels"]
    try:
        gpu = _C.Gpu(str(cuda_library()))
    except RuntimeError as error:
        return "cpu", None, [f"device 'auto' is the CPU: {error}"]
    return "cuda", gpu, [f"device 'auto' is {gpu.info()['name']}"]


def current_stream(array: Any) -> int:
    """Return the CUDA stream that work on an array on a GPU is queued on, as its handle's number.

    Args:
        array: a torch tensor: torch's current stream of its device; else an array whose
            `__cuda_array_interface__` may name a stream (0, the default stream, when it does not).
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return int(torch.cuda.current_stream(array.device).cuda_stream)
    return int(getattr(array, "__cuda_array_interface__", {}).get("stream") or 0)


def cuda_facts() -> dict[str, Any]:
    """Describe what `info` shows: whether kernels are built, and the GPUs they find."""
    built = cuda_library().is_file()
    facts: dict[str, Any] = {
        "built": built,
        "gpus": _C.Gpu.count(str(cuda_library())) if built else 0,
    }
    if facts["gpus"]:
        try:
            facts["device"] = _C.Gpu(str(cuda_library())).info()
        except RuntimeError as error:
            facts["error"] = str(error)
    return facts
