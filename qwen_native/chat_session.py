"""The interactive conversation of `qwen-native chat`."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_native.generation import Completion
    from qwen_native.llm import LLM

_HELP = """\
:help, :h               this list
:clear, :cl             clear the screen
:clear-history, :clh    forget the conversation
:history, :his          show the conversation
:seed, :seed N          show or set the seed of the answers; :seed none draws one each time
:settings, :conf        show the sampling settings
:settings NAME=VALUE    change one, e.g. :settings temperature=0
:reset-settings, :reset-conf   back to the start
:quit, :q, Ctrl-D       end
Ctrl-C stops an answer."""

_ALIASES = {
    "h": "help",
    "cl": "clear",
    "clh": "clear-history",
    "his": "history",
    "conf": "settings",
    "reset-conf": "reset-settings",
    "q": "quit",
    "exit": "quit",
}


class ChatSession:
    """A conversation in the terminal.

    Args:
        llm: The model.
        system: System message, or None for the checkpoint's own.
        enable_thinking: False makes a Qwen3 model answer without thinking.
        sampling: Options from the command line.
    """

    def __init__(
        self, llm: LLM, system: str | None, enable_thinking: bool, sampling: dict[str, Any]
    ) -> None:
        llm.defaults.updated(**sampling)  # complain now, not at the first answer
        self.llm = llm
        self.enable_thinking = enable_thinking
        self.initial = dict(sampling)
        self.sampling = dict(sampling)
        self.system: list[dict[str, object]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages: list[dict[str, object]] = []

    def run(self) -> int:
        """Read messages and commands until the end; returns the exit code."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing in input())
        print(f"{self.llm.path.name}, {self.llm.threads} threads. :help lists commands.")
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("\n(:quit or Ctrl-D ends)")
                continue
            if line.startswith(":"):
                if not self.command(line[1:]):
                    return 0
            elif line:
                self.answer(line)

    def answer(self, text: str) -> None:
        """Answer a message; what Ctrl-C leaves of the answer stays in the conversation."""
        question: dict[str, object] = {"role": "user", "content": text}
        messages = [*self.system, *self.messages, question]
        pieces: list[str] = []
        try:
            stream = self.llm.stream_chat(
                messages, enable_thinking=self.enable_thinking, **self.sampling
            )
            while True:
                try:
                    piece = next(stream)
                except StopIteration as end:
                    self._remember(question, end.value)
                    break
                pieces.append(piece)
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            stream.close()
            print("\n(stopped)")
            if pieces:
                self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]
        except ValueError as error:
            print(f"qwen-native: {error}", file=sys.stderr)

    def _remember(self, question: dict[str, object], completion: Completion) -> None:
        assert self.llm.chat_format is not None and self.llm.tokenizer is not None
        reply = self.llm.chat_format.parse_reply(self.llm.tokenizer, completion.token_ids)
        self.messages += [question, reply.to_message()]
        dropped = completion.prompt.dropped_turns if completion.prompt is not None else 0
        if dropped:
            print(f"\n({dropped} old rounds did not fit into the history window)")

    def command(self, line: str) -> bool:
        """Run a command; returns False when it ends the session."""
        name, _, argument = line.partition(" ")
        name, argument = _ALIASES.get(name, name), argument.strip()
        if name == "quit":
            return False
        action = {
            "help": lambda _: print(_HELP),
            "clear": lambda _: print("\033[2J\033[H", end=""),
            "clear-history": self._clear_history,
            "history": self._show_history,
            "seed": self._seed,
            "settings": self._settings,
            "reset-settings": self._reset_settings,
        }.get(name)
        if action is None:
            print(f":{name} is not a command; :help lists them")
        else:
            action(argument)
        return True

    def _clear_history(self, _: str) -> None:
        self.messages = []
        print("(the conversation is forgotten)")

    def _show_history(self, _: str) -> None:
        if not self.messages:
            print("(empty)")
        for message in self.messages:
            print(f"[{message['role']}] {message['content']}")

    def _seed(self, argument: str) -> None:
        if argument:
            self._change("seed", argument)
        print(f"seed = {self.sampling.get('seed', 'none')}")

    def _settings(self, argument: str) -> None:
        name, equals, value = argument.partition("=")
        if equals:
            self._change(name.strip(), value.strip())
        elif argument:
            print(f"{argument!r} is not NAME=VALUE")
            return
        effective = self.llm.defaults.updated(**self.sampling)
        for field in effective.__dataclass_fields__:
            print(f"  {field} = {getattr(effective, field)}")

    def _reset_settings(self, _: str) -> None:
        self.sampling = dict(self.initial)
        print("(settings are as at the start)")

    def _change(self, name: str, text: str) -> None:
        value: Any = text
        if text.lower() in ("none", ""):
            value = None
        else:
            for kind in (int, float):
                try:
                    value = kind(text)
                    break
                except ValueError:
                    continue
        try:
            self.llm.defaults.updated(**{**self.sampling, name: value})
        except (TypeError, ValueError) as error:
            print(f"qwen-native: {error}")
            return
        self.sampling[name] = value
