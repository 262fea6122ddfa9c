"""`python -m qwen_native.train`, which is what torchrun starts."""

import sys

from qwen_native.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
