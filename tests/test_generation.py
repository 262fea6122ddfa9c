"""qwen_native/generation.py: text released while it grows, stop texts, half characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen_native.generation import Output


class Bytes:
    """A decoder for ids that are bytes."""

    def __init__(self) -> None:
        import codecs

        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        return self.decoder.decode(bytes([index]))

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


def run(data: bytes, stop: tuple[str, ...], finish: str = "length") -> tuple[list[str], Output]:
    output = Output(1, stop, Bytes(), 0.0, with_logprobs=True, with_top=False)
    pieces = []
    for i, byte in enumerate(data):
        output.push(byte, -1.0, [], finish if i == len(data) - 1 else None)
        if piece := output.take():
            pieces.append(piece)
        if output.finish_reason is not None:
            break
    return pieces, output


def cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the stop text that is complete first; of several, the longest."""
    for end in range(1, len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return text[: end - max(sizes)]
    return text


@given(
    st.text(alphabet="ab#é你", min_size=1),
    st.lists(st.text(alphabet="ab#é你", min_size=1, max_size=4)),
)
def test_pieces_join_to_the_text_before_the_stop_text_that_is_complete_first(text, stops):
    pieces, output = run(text.encode(), tuple(stops))
    expected = cut(text, tuple(stops))
    assert "".join(pieces) == expected == output.completion(None).text
    assert output.finish_reason == ("stop" if expected != text else "length")


def test_a_possible_stop_text_is_held_back_and_then_released():
    output = Output(1, ("###",), Bytes(), 0.0, with_logprobs=False, with_top=False)
    taken = []
    for byte in b"a##b":
        output.push(byte, 0.0, [], None)
        taken.append(output.take())
    assert taken == ["a", "", "", "##b"]


def test_half_a_character_is_never_released():
    pieces, _ = run("你好".encode(), ())
    assert pieces == ["你", "好"]


def test_an_unfinished_character_at_the_end_becomes_a_replacement():
    pieces, _ = run("你".encode()[:2], ())
    assert "".join(pieces) == "�"


def test_the_stop_token_is_counted_but_not_shown():
    pieces, output = run(b"ab", (), finish="stop")
    assert pieces == ["a"]
    completion = output.completion(None)
    assert completion.text == "a"
    assert completion.token_ids == [ord("a"), ord("b")]
    assert completion.logprobs == [-1.0, -1.0]
    assert completion.finish_reason == "stop"
