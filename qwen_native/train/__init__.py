"""Training: pretraining, fine-tuning and alignment. Needs the extra `train`.

`qwen-native train --help` is the way in; docs/TRAINING.md explains it.
"""
