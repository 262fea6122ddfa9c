"""`qwen-native train merge`: a LoRA adapter and its base model become one model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from qwen_native.nn import Qwen
from qwen_native.train.lora import load_adapter, lora_layers, merge

_EPILOG = """examples:
  qwen-native train merge runs/sft_lora/model demo merged
  qwen-native train merge adapter Qwen/Qwen2.5-0.5B-Instruct merged --dtype f32
  qwen-native chat --model merged

An adapter that was trained on a quantised base (QLoRA) is merged into the unrounded one: name that.
"""
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Raises:
        ValueError: a folder is not usable, or the adapter does not fit the base.
    """
    parser = argparse.ArgumentParser(
        prog="qwen-native train merge",
        description="Merge a LoRA adapter into its base model and write the result as a folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, help="folder with adapter_config.json")
    parser.add_argument("base", help='folder, .gguf file, Hugging Face id, or "demo"')
    parser.add_argument("folder", type=Path, help="a new folder for the merged model")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16", help="default: bf16")
    options = parser.parse_args(argv)
    # The sum is rounded once, at the end.
    model = Qwen.load(None if options.base == "demo" else options.base, torch.float32)
    load_adapter(model, options.adapter)
    layers = len(lora_layers(model))
    merge(model)
    model.to(_DTYPES[options.dtype]).save(options.folder)
    sys.stderr.write(f"{layers} layers merged: {options.folder}\n")
    return 0
