"""qwen_native/cli.py and chat_session.py: what people type and read."""

from __future__ import annotations

import builtins
import io
import json
import os
import subprocess
import sys

import pytest
from demo_model import demo_path
from model.tiny import make_checkpoint

from qwen_native import cli
from qwen_native.chat_session import ChatSession
from qwen_native.llm import LLM


class Input(io.TextIOWrapper):
    """Standard input with given bytes, or a terminal."""

    def __init__(self, data: bytes = b"", terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def tiny(tmp_path):
    make_checkpoint(tmp_path, "qwen2")
    return tmp_path


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(demo_path(), weights="int8", context=1024)


@pytest.fixture
def use_demo(demo, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda options: demo)
    monkeypatch.setattr(sys, "stdin", Input(terminal=True))
    return demo


def test_errors_are_one_line_and_exit_with_2(capsys, tmp_path):
    assert cli.main(["info", "--model", str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("qwen-native: ") and err.count("\n") == 1
    assert "nowhere" in err and "Traceback" not in err


def test_unknown_options_exit_with_2():
    with pytest.raises(SystemExit) as end:
        cli.main(["chat", "--wat"])
    assert end.value.code == 2


@pytest.mark.parametrize("command", ["chat", "generate", "info", "quantize", "bench", "perplexity"])
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"qwen-native {command}" in capsys.readouterr().out.split("examples:")[1]


def test_the_installed_command_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qwen_native.cli", "--version"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,  # not the checkout, whose package may lack the extension
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("qwen-native ")


def test_info_shows_machine_and_model(tiny, capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "levels" in text and "threads" in text and "rms_norm" in text
    assert cli.main(["info", "--json", "--model", str(tiny), "--weights", "int4"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["isa"]["active"] in facts["isa"]["built"]
    assert facts["model"]["config"]["hidden_size"] == 96
    assert set(facts["model"]["weights"]) == {"int4"}


def test_bench_prints_json(tiny, capsys):
    arguments = [
        "--prompt",
        "8,16",
        "--gen",
        "2",
        "--depth",
        "0",
        "--batch",
        "1,2",
        "--repeats",
        "1",
    ]
    assert cli.main(["bench", "--json", "--model", str(tiny), *arguments]) == 0
    measurements = json.loads(capsys.readouterr().out)
    assert [m["kind"] for m in measurements] == ["prefill", "prefill", "decode", "decode"]
    assert cli.main(["bench", "--model", str(tiny), *arguments]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_chat_answers_once(use_demo, capsys):
    question = "What is 2 + 2? Answer with one number."
    assert cli.main(["chat", question, "--temperature", "0", "--max-new-tokens", "8"]) == 0
    assert "4" in capsys.readouterr().out
    assert cli.main(["chat", question, "--temperature", "0", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "4" in answer["text"] and answer["finish_reason"] == "stop"


def test_chat_reads_piped_text(use_demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Input("Say exactly: água".encode()))
    assert cli.main(["chat", "--temperature", "0", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()
    monkeypatch.setattr(sys, "stdin", Input(b"\xff\xfe"))
    assert cli.main(["chat"]) == 2
    assert "byte 0xff at 0, expected UTF-8" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Input(b""))
    assert cli.main(["chat"]) == 2
    assert "standard input is empty" in capsys.readouterr().err


def test_chat_does_not_wait_for_a_pipe_that_stays_open(use_demo, monkeypatch, capsys):
    reading, writing = os.pipe()
    with open(reading) as stdin, open(writing, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert cli.main(["chat", "Say yes.", "--temperature", "0", "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "nothing was piped in" in captured.err


def test_generate_continues_a_text(use_demo, capsys):
    arguments = ["The capital of France is", "--temperature", "0", "--max-new-tokens", "3"]
    assert cli.main(["generate", *arguments]) == 0
    assert "Paris" in capsys.readouterr().out
    assert cli.main(["generate", *arguments, "--json", "--n", "2", "--logprobs", "2"]) == 0
    completions = json.loads(capsys.readouterr().out)
    assert len(completions) == 2
    assert len(completions[0]["logprobs"]) == len(completions[0]["token_ids"])


def test_perplexity_of_a_file(use_demo, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    assert cli.main(["perplexity", str(file), "--window", "32"]) == 0
    assert 1 < float(capsys.readouterr().out) < 1000


def test_a_session_keeps_history_and_obeys_commands(demo, monkeypatch, capsys):
    lines = iter(
        [
            "My name is Ada. Say hello.",
            "What is my name? One word.",
            ":his",
            ":seed 7",
            ":conf top_p=2",
            ":conf temperature=0",
            ":reset-conf",
            ":nonsense",
            ":help",
            ":clh",
            ":h",
            ":q",
        ]
    )
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    session = ChatSession(demo, None, True, {"temperature": 0.0, "max_new_tokens": 24})
    assert session.run() == 0
    out = capsys.readouterr().out
    assert "Ada" in out.split("[user] What is my name? One word.")[1].split("\n")[1]
    assert "seed = 7" in out
    assert "top_p is 2, expected" in out
    assert ":nonsense is not a command" in out
    assert out.count(":quit, :q, Ctrl-D") == 2
    assert session.messages == []
    assert session.sampling == session.initial


def test_a_session_ends_at_the_end_of_input(demo, monkeypatch):
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(builtins, "input", end)
    assert ChatSession(demo, "Be brief.", True, {}).run() == 0


def test_an_interrupted_answer_stays_in_the_history(demo, monkeypatch):
    session = ChatSession(demo, None, True, {"temperature": 0.0})
    real = demo.stream_chat

    def interrupted(*arguments, **options):
        stream = real(*arguments, **options)
        for _ in range(3):
            yield next(stream)
        stream.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "stream_chat", interrupted)
    session.answer("Write a Python function that checks whether a string is a palindrome.")
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert not demo._engine.has_work
