"""Fine-tuning: what counts in the loss, packing, and a model that learns to answer and to stop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from train.tiny import byte_tokenizer, losses, tiny_model, train

from qwen_native import LLM
from qwen_native.chat import ChatFormat
from qwen_native.train.cli import main
from qwen_native.train.data import IGNORE
from qwen_native.train.records import Report
from qwen_native.train.sft import ChatOptions, Chats, describe, encode_chats, sample_of

QWEN1 = ChatFormat.for_checkpoint("qwen")
QWEN2 = ChatFormat.for_checkpoint("qwen2")
QWEN3 = ChatFormat.for_checkpoint("qwen3")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


@pytest.fixture
def tokenizer(tmp_path):
    return byte_tokenizer(tmp_path / "tokenizer")


def test_only_answers_and_their_end_count(tokenizer):
    text = QWEN2.render_training(tokenizer, chat("hi", "hello", "a<|im_end|>", "\nb"))
    assert describe(text, tokenizer) == (
        f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n⟦hello<|im_end|>⟧\n"
        "<|im_start|>user\na<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n⟦\nb<|im_end|>⟧\n"
    )
    # The end that the user spells is text and counts as little as the rest of the turn.
    assert text.token_ids.count(tokenizer.im_end) == 5


@pytest.mark.parametrize("form", [QWEN1, QWEN2], ids=["qwen", "qwen2"])
def test_what_counts_is_what_a_prompt_leaves_to_the_model(tokenizer, form):
    """The ids before the answer are the prompt that the engine would have got."""
    messages = chat("one", "two", "three", "four")
    text = form.render_training(tokenizer, messages)
    prompt = form.render(tokenizer, messages[:3]).token_ids
    assert text.token_ids[: len(prompt)] == prompt
    rest = text.token_ids[len(prompt) :]
    assert rest[:5] == [*b"four", tokenizer.im_end]
    assert text.trained[len(prompt) :] == [True] * 5 + [False] * (len(rest) - 5)
    assert text.token_ids == form.render(tokenizer, messages, add_generation_prompt=False).token_ids


def test_thinking_counts_where_the_format_keeps_it(tokenizer):
    thoughtful = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    text = QWEN3.render_training(tokenizer, [*chat("2+2?"), thoughtful])
    expected = "⟦<think>\n2 and 2\n</think>\n\n4<|im_end|>⟧"
    assert expected in describe(text, tokenizer)


def test_targets_are_the_next_tokens_that_count(tokenizer):
    text = QWEN2.render_training(tokenizer, chat("hi", "hello"))
    sample = sample_of(text)
    for i, target in enumerate(sample.targets):
        counts = i + 1 < len(text.trained) and text.trained[i + 1]
        assert target == (text.token_ids[i + 1] if counts else IGNORE)
    assert sample.counted == 6


def test_unusable_conversations_are_reported(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    records = [
        {"messages": chat("hi", "hello")},
        {"messages": chat("hi")},
        {"messages": chat("hi", "long " * 100)},
        {"messages": [{"role": "tool", "content": "x"}, *chat("hi", "hello")]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    def read(**options):
        report = Report()
        data = ChatOptions((str(path),), context=200, **options)
        return encode_chats(data, data.files, QWEN2, tokenizer, report), report

    texts, report = read()
    assert (len(texts), report.malformed, report.records) == (1, 3, 4)
    for problem in (
        "chats.jsonl:2: messages have no turn of role 'assistant'",
        "chats.jsonl:3: has 561 tokens, more than data.context 200",
        "chats.jsonl:4: messages[0]: role 'tool' after None",
    ):
        assert problem in report.summary()
    truncated, _ = read(too_long="truncate")
    assert [len(text.token_ids) for text in truncated] == [len(texts[0].token_ids), 200]
    with pytest.raises(ValueError, match="chats.jsonl:3: has 561 tokens"):
        read(too_long="error")


def conversations(tokenizer, count: int = 24):
    return [
        QWEN2.render_training(tokenizer, chat(f"{i}+{i}?", f"{2 * i}" * (1 + i % 4)))
        for i in range(count)
    ]


def test_an_epoch_has_every_conversation_once(tokenizer):
    source = Chats(conversations(tokenizer), [], ChatOptions((), 256), batch_size=5, seed=3)
    epochs = [[source.place(24 * epoch + i) for i in range(24)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]


def test_packed_sequences_hold_whole_conversations_within_the_context(tokenizer):
    texts = conversations(tokenizer)
    packed = Chats(texts, [], ChatOptions((), 256), 12, seed=3).step(0)
    alone = Chats(texts, [], ChatOptions((), 256, pack=False), 12, seed=3).step(0)
    assert len(packed) < len(alone) == 12
    assert all(len(sample.tokens) <= 256 for sample in packed)

    def parts(samples):
        cut = [np.split(s.tokens, np.cumsum(s.lengths)[:-1]) for s in samples]
        return sorted(tuple(part) for sample in cut for part in sample)

    assert parts(packed) == parts(alone)
    together = Chats(texts, [], ChatOptions((), 256, cross_documents=True), 12, seed=3).step(0)
    assert all(len(sample.lengths) == 1 for sample in together)


def test_packed_is_one_by_one(tmp_path, tokenizer):
    """The same trajectory; with attention across documents another one."""
    texts = conversations(tokenizer)
    curves = []
    for name, options, limit in (
        ("packed", {}, 512),
        ("single", {"pack": False}, 1),
        ("across", {"cross_documents": True}, 512),
    ):
        source = Chats(texts, [], ChatOptions((), 256, **options), 8, seed=3)
        model = tiny_model(tokenizer, torch.float32)
        train(tmp_path / name, model, source, limit=limit)
        curves.append(losses(tmp_path / name))
    # Float32 sums in another order, through five steps of Adam.
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-4)
    assert np.abs(np.subtract(curves[2], curves[0])).max() > 1e-3


def test_learns_to_answer_and_to_stop(tmp_path, capfd):
    animals = {"cat": "meow", "dog": "woof", "cow": "moo", "owl": "hoo hoo", "bee": "buzz"}
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": chat(a, b)}) + "\n" for a, b in animals.items())
    )
    (tmp_path / "recipe.yaml").write_text(f"""
model:
  shape: {{hidden_size: 64, intermediate_size: 128, num_layers: 2, num_heads: 2}}
  tokenizer: bytes
  precision: fp32
data: {{files: [{path}], context: 512}}
optim: {{learning_rate: 4e-3, warmup_steps: 10, weight_decay: 0.0}}
run: {{folder: {tmp_path / "run"}, steps: 140, batch_size: 5}}
""")
    assert main(["sft", str(tmp_path / "recipe.yaml")]) == 0
    shown = capfd.readouterr().err
    assert "5 conversations" in shown
    assert "⟦meow<|im_end|>⟧" in shown
    llm = LLM(tmp_path / "run" / "model", weights="f32")
    for question, answer in animals.items():
        reply = llm.chat(chat(question), temperature=0.0, max_new_tokens=40)
        assert (reply.text, reply.finish_reason) == (answer, "stop")
