"""qwen_native/train/process.py: memory that stays, and torch's threads."""

from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest
from train.tiny import environment

from qwen_native import ops

FAULTS = """
import resource, sys, torch
from qwen_native.train.process import prepare_process

def faults():
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(40 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

if sys.argv[1] == "prepared":
    prepare_process(torch.device("cpu"), "reference", torch.float32)
faults()
print(faults())
"""

THREADS = """
import sys, torch
from qwen_native import ops
from qwen_native.train.process import prepare_process
torch.set_num_threads(2)
ops.set_isa(sys.argv[1])
prepare_process(torch.device(sys.argv[2]), sys.argv[3], getattr(torch, sys.argv[4]))
print(torch.get_num_threads())
"""


def output(code: str, *arguments: str) -> int:
    # In processes of their own: what is set up holds for the rest of a process.
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(), cwd=tempfile.gettempdir(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again():
    pages = 5 * (40 << 20) // 4096
    assert output(FAULTS, "left alone") > pages / 2
    assert output(FAULTS, "prepared") < pages / 100


ISAS = [isa for isa in ("avx2", "amx") if isa in ops.available_isas()]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("device", "kernels", "dtype", "ours"),
    [
        ("cpu", "native", "bfloat16", True),
        ("cpu", "native", "float32", False),
        ("cpu", "reference", "bfloat16", False),
        ("meta", "native", "bfloat16", False),
    ],
)
def test_torch_gets_one_thread_where_all_products_are_ours(isa, device, kernels, dtype, ours):
    threads = output(THREADS, isa, device, kernels, dtype)
    assert threads == (1 if ours and isa == "amx" else 2)
