"""qwen_native/train/preference.py: what is trained on, and its log-probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_training as tiny
import torch
from model.tiny import make_checkpoint

from qwen_native.nn import Qwen
from qwen_native.train.preference import (
    ShuffledSamples,
    answer_log_probs,
    answer_sample,
    pair_sample,
    read_pair_samples,
    shuffled,
    target_log_probs,
)
from qwen_native.train.records import Report


def test_targets_are_the_answer():
    sample = answer_sample([5, 6, 7], [8, 9])
    assert sample.tokens.tolist() == [5, 6, 7, 8, 9]
    assert sample.targets.tolist() == [-100, -100, 8, 9, -100]
    pair = pair_sample([5, 6], [7, 8, 9], [4])
    assert pair.lengths == (5, 3) and pair.counted == 1
    assert pair.targets.tolist() == [-100, 7, 8, 9, -100, -100, 4, -100]


def test_log_probs_are_those_of_transformers(tmp_path):
    reference = make_checkpoint(tmp_path / "model", "qwen2")
    model = Qwen.load(tmp_path / "model")
    pairs = [([5, 6], [7, 8, 9], [4]), ([11], [12, 13], [300, 2, 2, 2])]
    samples = [pair_sample(*pair) for pair in pairs]
    expected, tokens = [], []
    for prompt, *answers in pairs:
        for answer in answers:
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + answer])).logits[0].double()
            rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            each = rows[torch.arange(len(answer)), torch.tensor(answer)]
            tokens += each.tolist()
            expected.append(float(each.sum()))
    with torch.no_grad():
        flat, documents = target_log_probs(model, samples)
        np.testing.assert_allclose(flat, tokens, rtol=1e-4)
        assert documents.tolist() == [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]
        np.testing.assert_allclose(answer_log_probs(model, samples), expected, rtol=1e-4)


def test_pairs_are_read_and_encoded(tmp_path):
    records = [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": "hi", "chosen": "yes" * 100, "rejected": "no"},
        {"prompt": "hi", "chosen": "yes"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    report = Report()
    encoder = tiny.encoder()
    [sample] = read_pair_samples([path], encoder, 100, report)
    assert report.records == 3 and report.malformed == 2
    assert "pairs.jsonl:2: has 3" in report.problems[0] and "at most 100" in report.problems[0]
    prompt = encoder.prompt([{"role": "user", "content": "hi"}])
    end = encoder.tokenizer.im_end
    chosen, rejected = [*b"yes", end], [*b"no", end]
    alphabet = {index: encoder.tokenizer.token_bytes(index) for index in range(256)}
    decoded = [alphabet.get(i, b"<>") for i in sample.tokens[len(prompt) : sample.lengths[0]]]
    assert b"".join(decoded) == b"yes<>"
    assert sample.lengths == (len(prompt) + len(chosen), len(prompt) + len(rejected))
    assert sample.tokens[-1] == end


def test_every_epoch_has_every_sample_once():
    drawn = [i for step in range(10) for i in shuffled(20, 4, 7, step)]
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == list(range(20))
    assert drawn[:20] != drawn[20:]
    assert shuffled(20, 4, 7, 6) == drawn[24:28]
    assert [i for step in range(10) for i in shuffled(20, 4, 8, step)] != drawn
    crossing = shuffled(5, 4, 7, 1)
    assert len(crossing) == 4
    samples = [answer_sample([1], [2])] * 20
    assert ShuffledSamples(samples, 8, 0).steps(3) == 8
    with pytest.raises(ValueError, match="no samples"):
        ShuffledSamples([], 8, 0)
