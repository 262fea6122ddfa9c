"""The engines that peers.py measures, behind one face: ours, llama.cpp and OpenVINO GenAI."""

from __future__ import annotations

import ctypes
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from qwen_native import _C, LLM
from qwen_native.bench import Benchmark
from qwen_native.hub import cache_folder

LLAMA_TYPES = {"int4": "Q4_0", "int8": "Q8_0"}
# Kept here, for llama.cpp calls it as long as the process lives.
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


class Engine(Protocol):
    """One loaded model.

    Attributes:
        name: Heading of its column.
        file_bytes: Size of its weights on disk.
    """

    name: str
    file_bytes: int

    def prefill_seconds(self, tokens: int) -> float:
        """Seconds from a prompt of that many random tokens to the first logits."""

    def decode_seconds(self, tokens: int, depth: int) -> float:
        """Seconds for that many greedy tokens of one sequence with `depth` tokens in the cache."""

    def batch_seconds(self, tokens: int, batch: int) -> float | None:
        """Seconds for that many steps of `batch` sequences; None where it cannot be asked for."""

    def logits(self, ids: Sequence[int], last: int) -> npt.NDArray[np.float32]:
        """The logits [last, vocab] after the last tokens of a prompt."""


class Native:
    """qwen_native."""

    def __init__(self, model: Path, weights: str, kv_dtype: str, threads: int) -> None:
        self.llm = LLM(model, weights=weights, kv_dtype=kv_dtype, threads=threads)
        self.name = f"ours {weights}"
        self.benchmark = Benchmark(self.llm)
        self.file_bytes = int(self.llm.model.weight_bytes)

    def prefill_seconds(self, tokens: int) -> float:
        return self.benchmark.prefill_seconds(tokens)

    def decode_seconds(self, tokens: int, depth: int) -> float:
        return self.benchmark.decode_seconds(tokens, depth, 1)

    def batch_seconds(self, tokens: int, batch: int) -> float:
        return self.benchmark.decode_seconds(tokens, 0, batch)

    def logits(self, ids: Sequence[int], last: int) -> npt.NDArray[np.float32]:
        return self.llm.logits(list(ids), last=last)

    def logits_of_single_steps(self, ids: Sequence[int], last: int) -> npt.NDArray[np.float32]:
        """As `logits`, with one token a step: the kernels of decoding."""
        engine = _C.Engine(
            self.llm.model,
            threads=self.llm.threads,
            context=len(ids) + 1,
            cache_tokens=len(ids) + 64,
            kv_dtype=self.llm.kv_dtype,
            max_step_tokens=1,
        )
        return engine.logits(list(ids), last)


class OnItsThread:
    """An engine all of whose calls come from one thread of its own.

    llama.cpp sets AMX tiles up once per thread and expects them to stay, OpenVINO takes them down
    on the thread that calls it.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._engine = self._thread.submit(make).result()
        self.name, self.file_bytes = self._engine.name, self._engine.file_bytes

    def prefill_seconds(self, tokens: int) -> float:
        return self._thread.submit(self._engine.prefill_seconds, tokens).result()

    def decode_seconds(self, tokens: int, depth: int) -> float:
        return self._thread.submit(self._engine.decode_seconds, tokens, depth).result()

    def batch_seconds(self, tokens: int, batch: int) -> float | None:
        return self._thread.submit(self._engine.batch_seconds, tokens, batch).result()

    def logits(self, ids: Sequence[int], last: int) -> npt.NDArray[np.float32]:
        return self._thread.submit(self._engine.logits, ids, last).result()


class LlamaCpp:
    """llama.cpp through its C API, without the Python layer's copies of the logits."""

    def __init__(self, file: Path, weights: str, threads: int, context: int, batch: int) -> None:
        """`context` tokens for one sequence, or shared by `batch` of them."""
        import llama_cpp

        self.api = llama_cpp
        self.name = f"llama.cpp {LLAMA_TYPES[weights]}"
        self.file_bytes = file.stat().st_size
        llama_cpp.llama_log_set(_SILENT, None)
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_params)
        if not self.model:
            raise RuntimeError(f"{file}: llama.cpp could not load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = batch
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        self.params = params
        self.context = self._new_context(flash_attention=True)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _new_context(self, flash_attention: bool) -> Any:
        """With flash attention, the default, prefill is faster, and decoding at 4096 tokens takes
        three times as long."""
        names = {True: "AUTO", False: "DISABLED"}
        self.params.flash_attn_type = getattr(
            self.api, f"LLAMA_FLASH_ATTN_TYPE_{names[flash_attention]}"
        )
        return self.api.llama_init_from_model(self.model, self.params)

    @staticmethod
    def requantised(source: Path, weights: str) -> Path:
        """The checkpoint requantised by llama.cpp, made once beside our cache.

        Raises:
            RuntimeError: llama.cpp cannot do it.
        """
        import llama_cpp

        llama_cpp.llama_log_set(_SILENT, None)
        target = cache_folder() / f"{source.stem}.{LLAMA_TYPES[weights].lower()}.gguf"
        if target.exists():
            return target
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{LLAMA_TYPES[weights]}")
        params.allow_requantize = True
        partial = target.with_suffix(".part")
        status = llama_cpp.llama_model_quantize(
            str(source).encode(), str(partial).encode(), ctypes.byref(params)
        )
        if status != 0:
            raise RuntimeError(f"{source}: llama.cpp could not requantise it, status {status}")
        return partial.rename(target)

    def _call(self, batch: Any) -> None:
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with {status}")

    def _decode(self, ids: list[int]) -> None:
        for begin in range(0, len(ids), 512):
            chunk = ids[begin : begin + 512]
            array = (self.api.llama_token * len(chunk))(*chunk)
            self._call(self.api.llama_batch_get_one(array, len(chunk)))
        self.api.llama_synchronize(self.context)

    def _clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _logits(self, index: int) -> npt.NDArray[np.float32]:
        pointer = self.api.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab,))

    def prefill_seconds(self, tokens: int) -> float:
        ids = _random_ids(tokens, self.vocab, tokens)
        self._clear()
        begin = time.perf_counter()
        self._decode(ids)
        return time.perf_counter() - begin

    def decode_seconds(self, tokens: int, depth: int) -> float:
        usual = self.context
        if depth > 0:
            self.context = self._new_context(flash_attention=False)
        try:
            ids = _random_ids(max(depth, 1), self.vocab, 0)
            self._clear()
            self._decode(ids)
            begin = time.perf_counter()
            token = ids[-1]
            for _ in range(tokens):
                self._decode([token])
                token = int(self._logits(-1).argmax())
            return time.perf_counter() - begin
        finally:
            if self.context is not usual:
                self.api.llama_free(self.context)
                self.context = usual

    def _fill(self, batch: Any, ids: Sequence[int], positions: Sequence[int], one: bool) -> None:
        """Tokens of one sequence with ascending positions, or one token for each sequence."""
        batch.n_tokens = len(ids)
        for i, (token, position) in enumerate(zip(ids, positions, strict=True)):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.logits[i] = 1, 1
            batch.seq_id[i][0] = 0 if one else i

    def batch_seconds(self, tokens: int, batch: int) -> float:
        self._clear()
        step = self.api.llama_batch_init(batch, 0, 1)
        ids = _random_ids(batch, self.vocab, 0)
        begin = time.perf_counter()
        for position in range(tokens):
            self._fill(step, ids, [position] * batch, one=False)
            self._call(step)
            ids = [int(self._logits(i).argmax()) for i in range(batch)]
        seconds = time.perf_counter() - begin
        self.api.llama_batch_free(step)
        return seconds

    def logits(self, ids: Sequence[int], last: int) -> npt.NDArray[np.float32]:
        self._clear()
        batch = self.api.llama_batch_init(512, 0, 1)
        rows = []
        for begin in range(0, len(ids), 512):
            chunk = ids[begin : begin + 512]
            self._fill(batch, chunk, range(begin, begin + len(chunk)), one=True)
            self._call(batch)
            first = max(len(ids) - last - begin, 0)
            rows += [self._logits(i).copy() for i in range(first, len(chunk))]
        self.api.llama_batch_free(batch)
        return np.stack(rows)


class OpenVino:
    """OpenVINO GenAI's LLMPipeline."""

    def __init__(self, folder: Path, weights: str, threads: int) -> None:
        import openvino_genai

        self.api = openvino_genai
        self.name = f"OpenVINO {weights}"
        self.file_bytes = (folder / "openvino_model.bin").stat().st_size
        self.vocab = int(json.loads((folder / "config.json").read_text())["vocab_size"])
        self.folder, self.threads = folder, threads
        self.pipeline = openvino_genai.LLMPipeline(
            str(folder), "CPU", INFERENCE_NUM_THREADS=threads
        )
        self.calls = 0

    @staticmethod
    def exported(source: Path, weights: str, optimum_cli: str) -> Path:
        """The checkpoint as OpenVINO IR, made once beside our cache.

        4 bits are symmetric in groups of 64, 8 bits one scale per row: optimum's own settings for
        speed.

        Raises:
            RuntimeError: optimum-cli fails.
        """
        from qwen_native.nn import Qwen

        target = cache_folder() / f"{source.stem}.openvino-{weights}"
        if target.exists():
            return target
        precision = ["--weight-format", weights]
        if weights == "int4":
            precision += ["--sym", "--group-size", "64", "--ratio", "1.0"]
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            Qwen.load(source).save(Path(scratch) / "hf")
            partial = Path(scratch) / "ir"
            command = [optimum_cli, "export", "openvino", "--model", f"{scratch}/hf"]
            command += ["--task", "text-generation-with-past", *precision, str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
            return partial.rename(target)

    def _generate(self, prompt: int, tokens: int) -> Any:
        """Performance counters of a run; every prompt is a new one, for prefixes are kept."""
        import openvino

        self.calls += 1
        ids = np.array([_random_ids(prompt, self.vocab, self.calls)], np.int64)
        options = self.api.GenerationConfig()
        options.max_new_tokens, options.ignore_eos, options.do_sample = tokens, True, False
        return self.pipeline.generate(openvino.Tensor(ids), options).perf_metrics

    def prefill_seconds(self, tokens: int) -> float:
        return float(self._generate(tokens, 1).get_ttft().mean) / 1000

    def decode_seconds(self, tokens: int, depth: int) -> float:
        metrics = self._generate(max(depth, 1), tokens + 1)
        return float(metrics.get_tpot().mean) / 1000 * tokens

    def batch_seconds(self, tokens: int, batch: int) -> None:
        return None

    def logits(self, ids: Sequence[int], last: int) -> npt.NDArray[np.float32]:
        import openvino

        model = openvino.Core().compile_model(
            self.folder / "openvino_model.xml", "CPU", {"INFERENCE_NUM_THREADS": self.threads}
        )
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return np.array(model(inputs)["logits"][0, -last:])


def _random_ids(count: int, vocab: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, vocab, count).tolist()
    return ids
