"""csrc/kernels/cpu/probe.cpp and csrc/ops/probe.cpp: the measured ceilings are plausible."""

from __future__ import annotations

import pytest

from qwen_native import _C


@pytest.mark.parametrize("threads", [1, 2])
def test_peaks_exist_where_the_level_has_the_instruction(isa, threads):
    peaks = _C.measure_peaks(threads, 32 << 20)
    assert peaks["isa"] == isa
    assert peaks["threads"] == threads
    assert peaks["read_bytes"] == 32 << 20
    for name in ("read_bandwidth", "fma_f32", "dot_int8"):
        # No machine that runs this is below 100 MB/s or 100 MFLOP/s; above 10^16 a loop was
        # optimised away.
        assert 1e8 < peaks[name] < 1e16, (name, peaks[name])
    assert (peaks["dot_bf16"] > 1e9) == (isa in ("avx512_bf16", "amx")), peaks["dot_bf16"]
    for name in ("tile_int8", "tile_bf16"):
        assert (peaks[name] > 1e9) == (isa == "amx"), (name, peaks[name])


def test_too_small_a_buffer_is_refused():
    with pytest.raises(ValueError, match=r"read_bytes is 100, expected at least 4096"):
        _C.measure_peaks(1, 100)
