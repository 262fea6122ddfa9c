"""The command `qwen-native`: chat, generate, info, quantize, bench, perplexity, train."""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_native import _C, __version__
from qwen_native.devices import cuda_facts

if TYPE_CHECKING:
    from qwen_native.bench import Measurement
    from qwen_native.llm import LLM, Progress

_SAMPLING = {
    "max_new_tokens": (int, "most tokens to generate"),
    "temperature": (float, "0 = always the most probable token"),
    "top_p": (float, "keep the fewest tokens with this total probability"),
    "top_k": (int, "keep the k most probable tokens"),
    "min_p": (float, "drop tokens below this fraction of the most probable one"),
    "repetition_penalty": (float, "above 1 makes tokens that occurred less likely"),
    "seed": (int, "makes the output repeatable"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # What follows `train` has a syntax of its own.
    own = arguments[:1] if arguments[:1] == ["train"] else arguments
    options = _parser().parse_args(own)
    options.rest = arguments[len(own) :]
    try:
        code: int = options.run(options)
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        message = " ".join(str(error).split())
        print(f"qwen-native: {message or type(error).__name__}", file=sys.stderr)
        return 2


def _train(options: argparse.Namespace) -> int:
    from qwen_native.train.cli import main as train

    return train(options.rest)


def _parser() -> argparse.ArgumentParser:
    parser = _command_parser(
        prog="qwen-native",
        description="Run Qwen language models natively on this machine's CPU.",
        examples="""
  qwen-native chat "Write a haiku about rivers."     one answer
  qwen-native chat                                   a conversation (:help lists its commands)
  git diff | qwen-native chat "Review this change."  with piped text
  qwen-native info                                   what this machine offers""",
    )
    parser.add_argument("--version", action="version", version=f"qwen-native {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    chat = _add_command(
        commands,
        "chat",
        _chat,
        "answer a message, or hold a conversation",
        """
  qwen-native chat "What is a monad?" --temperature 0
  qwen-native chat --model ./Qwen3-0.6B --no-thinking
  qwen-native chat --weights int4 < question.txt""",
    )
    chat.add_argument(
        "message", nargs="?", help="what to ask; without it and without piped text: a conversation"
    )
    chat.add_argument("--system", help="system message instead of the checkpoint's own")
    chat.add_argument("--no-thinking", action="store_true", help="Qwen3: answer without thinking")
    _add_sampling_options(chat)

    generate = _add_command(
        commands,
        "generate",
        _generate,
        "continue a text",
        """
  qwen-native generate "def fib(n):" --max-new-tokens 64 --temperature 0
  qwen-native generate --json "The capital of France is" --logprobs 3""",
    )
    generate.add_argument("prompt", nargs="?", help="the text; default: standard input")
    generate.add_argument("--n", type=int, default=1, help="number of continuations")
    generate.add_argument(
        "--logprobs", type=int, help="with --json: log-probabilities and this many alternatives"
    )
    _add_sampling_options(generate)

    info = _add_command(
        commands,
        "info",
        _info,
        "show what this machine offers and, with --model, what a checkpoint needs",
        """
  qwen-native info
  qwen-native info --model ./Qwen2.5-7B-Instruct --weights int4
  qwen-native info --json""",
        loads_model=False,
    )
    info.add_argument("--model", help="load this model and describe it ('demo' for the demo model)")
    info.add_argument("--weights", default="auto", help="auto (default), int4, int8, bf16 or f32")

    quantize = _add_command(
        commands,
        "quantize",
        _quantize,
        "write a packed file whose 4-bit weights are calibrated on a text",
        """
  qwen-native quantize demo coder.qn
  qwen-native quantize ./Qwen2.5-7B-Instruct qwen7b.qn --text notes.txt
  qwen-native quantize demo coder.qn --kl-budget 0.02     8 bits for the worst matrices
  qwen-native chat --model coder.qn
  qwen-native info --model coder.qn                       shows what the rounding costs""",
        loads_model=False,
    )
    quantize.add_argument(
        "model", help="folder, .gguf file or Hugging Face id; 'demo' for the demo model"
    )
    quantize.add_argument("out", help="the .qn file to write")
    quantize.add_argument("--weights", default="int4", choices=["int4"], help="int4 (default)")
    quantize.add_argument(
        "--text",
        help="a UTF-8 text like what the model will see, its last quarter for the measurement; "
        "default: the source code and the language reference of Python's library",
    )
    quantize.add_argument(
        "--tokens", type=int, default=16384, help="most tokens to calibrate on (default 16384)"
    )
    quantize.add_argument(
        "--kl-budget",
        type=float,
        help="highest mean KL divergence from the source, in nats; costs size where needed",
    )
    quantize.add_argument("--threads", type=int, help="default: the CPUs this process may use")

    bench = _add_command(
        commands,
        "bench",
        _bench,
        "measure speed beside the machine's own peaks",
        """
  qwen-native bench
  qwen-native bench --weights int4 --threads 2 --prompt 512,2048
  qwen-native bench --gen 64 --depth 0,4096 --batch 1,16 --json""",
    )
    bench.add_argument(
        "--prompt", type=_numbers, default=[512], help="prompt lengths (default 512)"
    )
    bench.add_argument("--gen", type=int, default=64, help="tokens per decode case (default 64)")
    bench.add_argument(
        "--depth", type=_numbers, default=[0], help="tokens already in the cache (default 0)"
    )
    bench.add_argument("--batch", type=_numbers, default=[1], help="sequences at once (default 1)")
    bench.add_argument("--repeats", type=int, default=5, help="repeats per case; the median counts")

    perplexity = _add_command(
        commands,
        "perplexity",
        _perplexity,
        "score a text",
        """
  qwen-native perplexity book.txt
  qwen-native perplexity book.txt --window 512 --weights int4 --json""",
    )
    perplexity.add_argument("file", help="a UTF-8 text file, - for standard input")
    perplexity.add_argument(
        "--window", type=int, default=1024, help="tokens per window (default 1024)"
    )

    train = commands.add_parser("train", add_help=False, help="train and align models")
    train.set_defaults(run=_train)
    return parser


def _command_parser(examples: str, **options: Any) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


def _add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    examples: str,
    *,
    loads_model: bool = True,
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    command.add_argument("--json", action="store_true", help="print JSON for scripts")
    if loads_model:
        command.add_argument(
            "--model", help="folder, .gguf or .qn file, or Hugging Face id; default: the demo model"
        )
        command.add_argument(
            "--weights", default="auto", help="auto (default), int4, int8, bf16 or f32"
        )
        command.add_argument(
            "--device", default="cpu", help="cpu (default), cuda, or auto: a GPU when there is one"
        )
        command.add_argument("--threads", type=int, help="default: the CPUs this process may use")
        command.add_argument(
            "--kv-dtype",
            default="auto",
            help="precision of the KV cache: auto (default), bf16, f32 or int8 (half the memory)",
        )
        command.add_argument(
            "--context", type=int, help="most tokens of prompt and output together"
        )
    return command


def _add_sampling_options(command: argparse.ArgumentParser) -> None:
    for name, (kind, summary) in _SAMPLING.items():
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, help=summary)
    command.add_argument(
        "--speculation",
        default="prompt_lookup",
        help="prompt_lookup (default): guess text that is copied or edited; off",
    )
    command.add_argument(
        "--stop", action="append", help="end the output before this text (repeatable)"
    )


def _numbers(text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers such as 512,2048"
        ) from None
    if min(values) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} has a negative number")
    return values


def _sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    chosen = {name: getattr(options, name) for name in (*_SAMPLING, "stop")}
    return {name: value for name, value in chosen.items() if value is not None}


@contextmanager
def _progress_bar(*, in_bytes: bool = True) -> Iterator[Progress | None]:
    """A progress bar on the terminal; nothing where the output is not one."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as RichProgress

    amount = DownloadColumn() if in_bytes else TaskProgressColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount)
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield update


def _load(options: argparse.Namespace) -> LLM:
    from qwen_native.llm import LLM

    with _progress_bar() as progress:
        llm = LLM(
            options.model,
            device=getattr(options, "device", "cpu"),
            weights=options.weights,
            threads=getattr(options, "threads", None),
            context=getattr(options, "context", None),
            kv_dtype=getattr(options, "kv_dtype", "auto"),
            speculation=getattr(options, "speculation", "prompt_lookup"),
            progress=progress,
        )
    for notice in llm.notices:
        print(f"qwen-native: {notice}", file=sys.stderr)
    return llm


def _chat(options: argparse.Namespace) -> int:
    message = options.message
    piped = sys.stdin is not None and not sys.stdin.isatty()
    if message == "-" or (message is None and piped):
        message, piped = _read_stdin(), False
        if not message:
            raise ValueError("there is no message: standard input is empty")
    llm = _load(options)
    if message is not None and piped:
        # The pipe may be one that nobody ever closes, inherited from whoever started us.
        if _stdin_has_data():
            message = "\n\n".join(part for part in (message, _read_stdin()) if part)
        else:
            print('qwen-native: nothing was piped in; "-" waits for it', file=sys.stderr)
    sampling = _sampling_options(options)
    if message is None:
        from qwen_native.chat_session import ChatSession

        return ChatSession(llm, options.system, not options.no_thinking, sampling).run()
    messages = [{"role": "system", "content": options.system}] if options.system is not None else []
    messages.append({"role": "user", "content": message})
    if options.json:
        _print_json(
            _completion_json(
                llm.chat(messages, enable_thinking=not options.no_thinking, **sampling)
            )
        )
        return 0
    for piece in llm.stream_chat(messages, enable_thinking=not options.no_thinking, **sampling):
        print(piece, end="", flush=True)
    print()
    return 0


def _generate(options: argparse.Namespace) -> int:
    prompt = options.prompt if options.prompt is not None else _read_stdin()
    llm = _load(options)
    sampling = _sampling_options(options)
    if options.json or options.n > 1:
        result = llm.generate(prompt, n=options.n, logprobs=options.logprobs, **sampling)
        completions = result if isinstance(result, list) else [result]
        if options.json:
            _print_json([_completion_json(completion) for completion in completions])
        else:
            for completion in completions:
                print(completion.text, end="\n\n")
        return 0
    for piece in llm.stream(prompt, **sampling):
        print(piece, end="", flush=True)
    print()
    return 0


def _info(options: argparse.Namespace) -> int:
    budget = _C.thread_budget()
    facts: dict[str, Any] = {
        "version": __version__,
        "isa": {"host": _C.host_isa(), "built": _C.built_isas(), "active": _C.active_isa()},
        "kernels": _C.kernel_sources(),
        "threads": budget,
        "cuda": cuda_facts(),
    }
    if options.model is not None:
        options.model = None if options.model == "demo" else options.model
        llm = _load(options)
        facts["model"] = {
            "path": str(llm.path),
            "config": asdict(llm.config),
            "weights": {
                name: {"weights": count, "bytes": size}
                for name, (count, size) in llm.model.bytes_by_format.items()
            },
            "weight_bytes": llm.model.weight_bytes,
            "packed_file": None if llm.packed_file is None else str(llm.packed_file),
            "receipt": dict(llm.receipt),
            "kv_dtype": llm.kv_dtype,
            "context": llm.context,
            "defaults": asdict(llm.defaults),
        }
    if options.json:
        _print_json(facts)
        return 0
    isa = facts["isa"]
    quota = budget["quota"] or "none"
    print(f"qwen-native {__version__}")
    print(
        f"levels   host {isa['host']}, built {' '.join(isa['built'])}, "
        f"active {isa['active']} (QN_ISA lowers it)"
    )
    print(
        f"threads  {budget['threads']}: affinity {budget['affinity']}, cores {budget['cores']}, "
        f"cgroup quota {quota}, QN_THREADS {budget['override'] or 'not set'}"
    )
    cuda = facts["cuda"]
    gpu = cuda["device"]["name"] if "device" in cuda else cuda.get("error", "no GPU found")
    print(f"cuda     {f'built, {gpu}' if cuda['built'] else 'not built'}")
    print("kernels  " + ", ".join(f"{op}: {level}" for op, level in facts["kernels"].items()))
    if "model" in facts:
        model = facts["model"]
        print(f"model    {model['path']}")
        print(
            f"weights  {model['weight_bytes'] / 1e6:.1f} MB: "
            + ", ".join(
                f"{name} {entry['bytes'] / 1e6:.1f} MB "
                f"({8 * entry['bytes'] / entry['weights']:.2f} bits per weight)"
                for name, entry in model["weights"].items()
            )
        )
        print(f"packed   {model['packed_file'] or 'no file, converted at every load'}")
        _print_receipt(model["receipt"])
        print(f"cache    {model['kv_dtype']}, context {model['context']} tokens")
        for name, value in model["config"].items():
            print(f"  {name} = {value}")
    return 0


def _print_receipt(receipt: Mapping[str, Any]) -> None:
    for name, value in receipt.items():
        if not isinstance(value, dict):
            print(f"  {name} = {value}")
            continue
        print(f"  {name}:")
        layers: dict[str, list[str]] = {}
        for tensor, error in value.items():
            layer, _, part = tensor.removesuffix(".weight").rpartition(
                ".self_attn." if ".self_attn." in tensor else ".mlp."
            )
            layers.setdefault(layer or part, []).append(f"{part if layer else 'all'} {error}")
        for layer, errors in layers.items():
            print(f"    {layer}: {', '.join(errors)}")


def _quantize(options: argparse.Namespace) -> int:
    from qwen_native.quantize import quantize

    with _progress_bar(in_bytes=False) as progress:
        receipt = quantize(
            None if options.model == "demo" else options.model,
            options.out,
            text=options.text,
            tokens=options.tokens,
            kl_budget=options.kl_budget,
            threads=options.threads,
            progress=progress,
        )
    if options.json:
        _print_json(receipt)
    else:
        print(f"{options.out}: {receipt['bits_per_weight']} bits per weight")
        print(f"mean KL from the source  {receipt['mean_kl']}")
        print(f"top-1 flips              {receipt['top1_flips']:.2%}")
        print(
            f"perplexity               {receipt['perplexity']} "
            f"(source {receipt['source_perplexity']})"
        )
        if receipt["matrices_at_8_bits"]:
            print(f"matrices at 8 bits       {len(receipt['matrices_at_8_bits'])}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from qwen_native.bench import Benchmark

    llm = _load(options)
    benchmark = Benchmark(llm, options.repeats)
    columns = ("kind", "tokens", "depth", "batch", "tokens/s", "spread", "bandwidth", "peak")
    header = "{:8} {:>7} {:>6} {:>6} {:>10} {:>7} {:>10} {:>7}".format(*columns)

    def show(m: Measurement) -> None:
        print(
            f"{m.kind:8} {m.tokens:7} {m.depth:6} {m.batch:6} {m.tokens_per_second:10.1f} "
            f"{m.spread:7.1%} {m.bandwidth_share:10.1%} {m.peak_share:7.1%}",
            flush=True,
        )

    if not options.json:
        peaks = benchmark.peaks
        print(
            f"{llm.path.name}, weights {options.weights}, {llm.threads} threads, {peaks['isa']}; "
            f"this machine reads {peaks['read_bandwidth'] / 1e9:.1f} GB/s"
        )
        print(header)
    measurements = benchmark.run(
        options.prompt,
        options.gen,
        options.depth,
        options.batch,
        (lambda m: None) if options.json else show,
    )
    if options.json:
        _print_json([m.to_json() for m in measurements])
    return 0


def _perplexity(options: argparse.Namespace) -> int:
    text = _read_stdin() if options.file == "-" else _read_file(Path(options.file))
    llm = _load(options)
    with _progress_bar() as progress:
        value = llm.perplexity(text, options.window, progress=progress)
    if options.json:
        _print_json({"perplexity": value, "window": options.window, "weights": options.weights})
    else:
        print(f"{value:.4f}")
    return 0


def _stdin_has_data() -> bool:
    """Whether reading standard input would not wait: it has bytes, or it is at its end."""
    try:
        return bool(select.select([sys.stdin], [], [], 0)[0])
    except (OSError, ValueError):
        return True


def _read_stdin() -> str:
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _read_file(path: Path) -> str:
    return _decoded(path.read_bytes(), str(path))


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} has byte {data[error.start]:#04x} at {error.start}, expected UTF-8"
        ) from None


def _completion_json(completion: Any) -> dict[str, Any]:
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "logprobs": completion.logprobs,
        "top_logprobs": completion.top_logprobs,
        "finish_reason": completion.finish_reason,
        "timings": asdict(completion.timings),
    }


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, ensure_ascii=False, indent=1)
    print()


if __name__ == "__main__":
    sys.exit(main())
