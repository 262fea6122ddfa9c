"""Chat prompts as token ids, and replies back into messages.

A prompt has two kinds of text. The scaffolding (`<|im_start|>`, `<think>`, `<tool_call>` …) is
written here and becomes special tokens; everything that a message, a tool or its result says goes
through `Tokenizer.encode`, which cannot produce one. So no content can end its own turn or forge
another, whatever it spells.

Text between two special tokens is encoded in one go, scaffolding and content together, because the
checkpoints were trained on that: in `system\\nYou are …` a content that starts with a line end
merges with the one before it. For content that spells no special token, the ids are therefore those
of the checkpoint's own Jinja template in `transformers`. The original Qwen is the exception: its
`make_context` encodes role, line end and content one by one, and so does this module for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qwen_native.errors import CheckpointError, quoted
from qwen_native.tokenizer import END_OF_TEXT, IM_END, IM_START, Tokenizer

HELPFUL_ASSISTANT = "You are a helpful assistant."

# The wording of the templates of Qwen2.5 and Qwen3.
_TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

_ALLOWED_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt ready for the model.

    Attributes:
        token_ids: The whole prompt.
        stop_ids: Ids that end the reply.
        dropped_turns: How many of the oldest rounds (a user message and all up to the next one) did
            not fit into the history window and are not in the prompt.
    """

    token_ids: list[int]
    stop_ids: tuple[int, ...]
    dropped_turns: int


@dataclass(frozen=True)
class TrainingText:
    """A conversation to learn from.

    Attributes:
        token_ids: The whole conversation.
        trained: For each token whether a model should learn to produce it: what an assistant's turn
            holds, and the token that ends it.
    """

    token_ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant asks for: the tool's name and its arguments by name."""

    name: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class Reply:
    """What the assistant said, taken apart.

    Attributes:
        content: The answer, without thinking and tool calls.
        reasoning_content: The thinking; None if the reply has none.
        tool_calls: The calls, in order. A block that is not a valid call stays in `content`.
    """

    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    def to_message(self) -> dict[str, object]:
        """Give the message that stands for this reply in the history of the next prompt."""
        message: dict[str, object] = {"role": "assistant", "content": self.content}
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [
                {"name": call.name, "arguments": call.arguments} for call in self.tool_calls
            ]
        return message


@dataclass(frozen=True)
class _Call:
    name: str
    arguments: str | dict[str, object]


@dataclass(frozen=True)
class _Message:
    role: str
    content: str
    reasoning: str | None
    calls: tuple[_Call, ...]


@dataclass(frozen=True)
class ChatFormat:
    """How a checkpoint wants its chats written. The generations of Qwen differ in these fields
    only.

    Attributes:
        name: For messages to people: "qwen", "qwen2" or "qwen3".
        default_system: The system message where the caller gives none; None for no system turn.
        tools: Whether tools can be offered to the model, in the Hermes form.
        thinking: "none"; "switch" for models that think unless told not to (Qwen3); "always" for
            models whose prompt opens the thinking itself (Qwen3-Thinking-2507).
        separate_pieces: Role, line end and content are encoded one by one, and turns are joined by
            line ends instead of ended by them: the original Qwen.
        max_window_tokens: Default of `render`'s option of the same name.
        verbatim_arguments: Tool arguments given as JSON text are taken as they are (Qwen3), not
            parsed and written anew.
    """

    name: str
    default_system: str | None = None
    tools: bool = False
    thinking: Literal["none", "switch", "always"] = "none"
    separate_pieces: bool = False
    max_window_tokens: int | None = None
    verbatim_arguments: bool = False

    @classmethod
    def for_checkpoint(
        cls,
        architecture: str,
        chat_template: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> ChatFormat:
        """Choose the format of a checkpoint.

        The Jinja template is not run: its text tells the default system message, whether it knows
        tools, and how it treats thinking.

        Args:
            architecture: "qwen", "qwen2" (Qwen1.5, 2 and 2.5) or "qwen3".
            chat_template: The checkpoint's Jinja template, if it has one. Without it, qwen2 means
                Qwen2 (no tools, "You are a helpful assistant.") and qwen3 the hybrid Qwen3.
            metadata: The generation config; `max_window_size` is read, for the original Qwen.

        Raises:
            CheckpointError: The architecture is unknown, or the template is not ChatML.
        """
        if architecture == "qwen":
            window = (metadata or {}).get("max_window_size", 6144)
            if not isinstance(window, int) or isinstance(window, bool) or window < 1:
                raise CheckpointError(
                    f"max_window_size is {quoted(window)}, expected a positive integer"
                )
            return cls("qwen", HELPFUL_ASSISTANT, separate_pieces=True, max_window_tokens=window)
        if architecture not in ("qwen2", "qwen3"):
            raise CheckpointError(
                f"architecture {quoted(architecture)} has no known chat format, "
                "expected 'qwen', 'qwen2' or 'qwen3'"
            )
        if chat_template is None:
            if architecture == "qwen3":
                return cls("qwen3", tools=True, thinking="switch", verbatim_arguments=True)
            return cls("qwen2", HELPFUL_ASSISTANT)
        if IM_START not in chat_template:
            raise CheckpointError(
                f"chat template {quoted(chat_template)} is not ChatML: no {IM_START}"
            )
        thinking: Literal["none", "switch", "always"] = "none"
        if "enable_thinking" in chat_template:
            thinking = "switch"
        elif re.search(r"assistant(\\n|\n)<think>(\\n|\n)['\"]\s*-?\}\}", chat_template):
            thinking = "always"
        return cls(
            architecture,
            _default_system(chat_template),
            tools="<tool_call>" in chat_template,
            thinking=thinking,
            verbatim_arguments="arguments is string" in chat_template,
        )

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Give the ids that end a reply: `<|im_end|>`, `<|endoftext|>`; for Qwen `<|im_start|>`
        too."""
        forms = (IM_END, IM_START, END_OF_TEXT) if self.separate_pieces else (IM_END, END_OF_TEXT)
        special = tokenizer.special_tokens
        return tuple(special[form] for form in forms if form in special)

    def render(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        enable_thinking: bool = True,
        max_window_tokens: int | None = None,
    ) -> RenderedPrompt:
        """Turn messages into the ids of a prompt.

        Args:
            tokenizer: The checkpoint's tokenizer.
            messages: Each with `role` ("system", for the original Qwen only first; "user";
                "assistant"; "tool", after the assistant turn that called) and `content` (str).
                Assistant messages may have `reasoning_content` and `tool_calls` (`name` and
                `arguments`, also in OpenAI's form inside `function`); `tool_call_id` and `name` of
                tool messages are accepted and not rendered, as the formats have no place for them.
            add_generation_prompt: Open the assistant's turn at the end.
            tools: JSON schemas of the tools, if any.
            enable_thinking: False makes a switchable model answer without thinking.
            max_window_tokens: History window: going back from the newest, a past round is kept
                while system turn, kept rounds and this round together are below this many tokens.
                The system turn and the current round are always kept, and the latter is not
                counted, as in the original `make_context`. Default: the format's own.

        Raises:
            ValueError: A message, or an option that this format lacks; the text says which.
        """
        for form in (IM_START, IM_END):
            if form not in tokenizer.special_tokens:
                raise ValueError(f"the vocabulary has no {form} token, which chat prompts need")
        if max_window_tokens is None:
            max_window_tokens = self.max_window_tokens
        elif max_window_tokens < 1:
            raise ValueError(f"max_window_tokens is {max_window_tokens}, expected 1 or more")
        if tools and not self.tools:
            raise ValueError(
                f"tools: the {self.name} format of this checkpoint has none, expected None"
            )
        if not enable_thinking and self.thinking == "always":
            raise ValueError("enable_thinking is False, but this checkpoint always thinks")
        checked = [_checked(message, i) for i, message in enumerate(_listed(messages, "messages"))]
        self._check_order(checked, add_generation_prompt)
        system = self.default_system
        if checked[0].role == "system":
            system = checked.pop(0).content

        head = self._system(tokenizer, system, tools or ())
        rounds: list[list[int]] = []
        for role, ids in self._turns(tokenizer, checked):
            if role == "user" or not rounds:
                rounds.append([])
            rounds[-1] += ids
        kept = len(rounds)
        if max_window_tokens is not None and rounds:
            kept = 1
            size = len(head)
            while kept < len(rounds) and size + len(rounds[-1 - kept]) < max_window_tokens:
                size += len(rounds[-1 - kept])
                kept += 1
        ids = head + [index for turn in rounds[len(rounds) - kept :] for index in turn]
        if add_generation_prompt:
            ids += self._generation_prompt(tokenizer, enable_thinking)
        return RenderedPrompt(ids, self.stop_ids(tokenizer), len(rounds) - kept)

    def render_training(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> TrainingText:
        """Turn a conversation into ids with the positions that an assistant produces.

        The ids are those of `render`, but an assistant's content is encoded apart from what stands
        before it, as it is when the model generates it. Which tokens count is decided by position.

        Args:
            tokenizer: The checkpoint's tokenizer.
            messages: As for `render`, with an assistant's message.
            tools: As for `render`.

        Raises:
            ValueError: A message, or an option that this format lacks; or no assistant speaks.
        """
        if tools and not self.tools:
            raise ValueError(
                f"tools: the {self.name} format of this checkpoint has none, expected None"
            )
        checked = [_checked(message, i) for i, message in enumerate(_listed(messages, "messages"))]
        self._check_order(checked, add_generation_prompt=False)
        if all(message.role != "assistant" for message in checked):
            raise ValueError("messages have no turn of role 'assistant', expected one to learn")
        system = self.default_system
        if checked[0].role == "system":
            system = checked.pop(0).content
        ids = self._system(tokenizer, system, tools or ())
        trained = [False] * len(ids)
        opening = self._generation_prompt(tokenizer, enable_thinking=True)
        # Turns of earlier rounds do not open the thinking that the prompt of a reply opens.
        shorter = self.thinking == "always"
        header = (
            opening[: opening.index(tokenizer.special_tokens["<think>"])] if shorter else opening
        )
        for role, turn in self._turns(tokenizer, checked, apart=True):
            begin = end = 0
            if role == "assistant":
                begin = len(opening if turn[: len(opening)] == opening else header)
                # What follows the end token is written by whoever continues the conversation.
                end = len(turn) - turn[::-1].index(tokenizer.im_end)
            ids += turn
            trained += [begin <= i < end for i in range(len(turn))]
        return TrainingText(ids, trained)

    def parse_reply(self, tokenizer: Tokenizer, token_ids: Iterable[int]) -> Reply:
        """Take a generated reply apart: thinking, tool calls, answer.

        Only special tokens count, never text that spells them. The thinking ends at the last
        `</think>`; a reply cut off before that is all thinking. Tool calls inside it are not
        parsed.

        Args:
            tokenizer: The checkpoint's tokenizer.
            token_ids: The generated ids, with or without the stop id at the end; what follows a
                stop id is left out.
        """
        stops = self.stop_ids(tokenizer)
        ids = list(token_ids)
        ids = ids[: next((i for i, index in enumerate(ids) if index in stops), len(ids))]
        special = tokenizer.special_tokens
        reasoning: str | None = None
        if self.thinking != "none" and "</think>" in special and "<think>" in special:
            opened = self.thinking == "always" or special["<think>"] in ids[:1]
            if special["</think>"] in ids:
                end = len(ids) - 1 - ids[::-1].index(special["</think>"])
                reasoning = tokenizer.decode(ids[:end]).removeprefix("<think>").strip("\n")
                ids = ids[end + 1 :]
            elif opened:
                return Reply("", tokenizer.decode(ids).removeprefix("<think>").strip("\n"))
        content, calls = _split_calls(tokenizer, ids) if self.tools else (tokenizer.decode(ids), [])
        return Reply(
            content if reasoning is None else content.lstrip("\n"), reasoning, tuple(calls)
        )

    def _check_order(self, messages: Sequence[_Message], add_generation_prompt: bool) -> None:
        if not messages:
            raise ValueError("messages is empty, expected at least one user message")
        before = None
        for i, message in enumerate(messages):
            where = f"messages[{i}]"
            if message.role == "tool" and before not in ("assistant", "tool"):
                raise ValueError(
                    f"{where}: role 'tool' after {before!r}, expected it after 'assistant'"
                )
            if not self.tools and (message.role == "tool" or message.calls):
                raise ValueError(f"{where}: the {self.name} format of this checkpoint has no tools")
            if message.reasoning and self.thinking == "none":
                raise ValueError(f"{where}: reasoning_content, but this checkpoint has no thinking")
            if self.separate_pieces and (i > 0 or message.role != "system"):
                expected = "assistant" if before == "user" else "user"
                if message.role != expected:
                    raise ValueError(f"{where}: role {message.role!r}, expected {expected!r}")
            before = message.role
        if add_generation_prompt and before not in ("user", "tool"):
            raise ValueError(
                f"messages end with role {before!r}, expected 'user' or 'tool' before a reply"
            )

    def _system(
        self, tokenizer: Tokenizer, system: str | None, tools: Sequence[Mapping[str, object]]
    ) -> list[int]:
        if system is None and not tools:
            return []
        if self.separate_pieces:
            return _separate_turn(tokenizer, "system", system or "")
        prompt = _Prompt(tokenizer)
        prompt.scaffold(f"{IM_START}system\n")
        if system is not None:
            prompt.content(system)
        if tools:
            prompt.scaffold("\n\n" * (system is not None) + _TOOLS_HEAD)
            for i, tool in enumerate(_listed(tools, "tools")):
                if not isinstance(tool, Mapping):
                    raise ValueError(
                        f"tools[{i}] is {quoted(tool)}, expected a JSON schema (a dict)"
                    )
                prompt.content("\n" + _json(tool, f"tools[{i}]"))
            prompt.scaffold(_TOOLS_TAIL)
        prompt.scaffold(f"{IM_END}\n")
        return prompt.encode()

    def _turns(
        self, tokenizer: Tokenizer, messages: Sequence[_Message], apart: bool = False
    ) -> list[tuple[str, list[int]]]:
        """Encode each turn; tool results that follow one another share a turn of role "tool".

        With `apart`, what an assistant says is not merged with the line end before it.
        """
        if self.separate_pieces:
            line_end = tokenizer.encode("\n")
            return [
                (m.role, line_end + _separate_turn(tokenizer, m.role, m.content)) for m in messages
            ]
        last_query = _last_query(messages)
        turns: list[tuple[str, list[int]]] = []
        for i, message in enumerate(messages):
            prompt = _Prompt(tokenizer)
            if message.role == "assistant":
                think = i > last_query and self.thinking != "none"
                self._assistant(prompt, message, think, i == len(messages) - 1, apart)
            elif message.role == "tool":
                if messages[i - 1].role == "tool":
                    continue
                prompt.scaffold(f"{IM_START}user")
                for result in messages[i:]:
                    if result.role != "tool":
                        break
                    prompt.scaffold("\n<tool_response>\n")
                    prompt.content(result.content)
                    prompt.scaffold("\n</tool_response>")
            else:
                prompt.scaffold(f"{IM_START}{message.role}\n")
                prompt.content(message.content)
            prompt.scaffold(f"{IM_END}\n")
            turns.append((message.role, prompt.encode()))
        return turns

    def _assistant(
        self, prompt: _Prompt, message: _Message, think: bool, last: bool, apart: bool
    ) -> None:
        """Write an assistant turn, with its thinking only after the last question (`think`)."""
        content, reasoning = message.content, message.reasoning
        if self.thinking != "none" and reasoning is None and "</think>" in content:
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1]
            content = content.split("</think>")[-1].lstrip("\n")
        prompt.scaffold(f"{IM_START}assistant\n")
        if apart:
            prompt.cut()
        if think and (last or reasoning):
            prompt.scaffold("<think>\n")
            if apart and self.thinking == "always":
                prompt.cut()
            prompt.content((reasoning or "").strip("\n"))
            prompt.scaffold("\n</think>\n\n")
            prompt.content(content.lstrip("\n"))
        else:
            prompt.content(content)
        for i, call in enumerate(message.calls):
            prompt.scaffold(("\n" if content or i else "") + '<tool_call>\n{"name": "')
            prompt.content(call.name)
            prompt.scaffold('", "arguments": ')
            given = call.arguments
            if not (isinstance(given, str) and self.verbatim_arguments):
                given = _json(_parsed(given), "arguments")
            prompt.content(given)
            prompt.scaffold("}\n</tool_call>")

    def _generation_prompt(self, tokenizer: Tokenizer, enable_thinking: bool) -> list[int]:
        if self.separate_pieces:
            line_end = tokenizer.encode("\n")
            return [*line_end, tokenizer.im_start, *tokenizer.encode("assistant"), *line_end]
        prompt = _Prompt(tokenizer)
        prompt.scaffold(f"{IM_START}assistant\n")
        if self.thinking == "always":
            prompt.scaffold("<think>\n")
        elif self.thinking == "switch" and not enable_thinking:
            prompt.scaffold("<think>\n\n</think>\n\n")
        return prompt.encode()


class _Prompt:
    """Collects scaffolding and content, and encodes what lies between special tokens in one go."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._parts: list[int | list[str]] = []

    def scaffold(self, text: str) -> None:
        """Append text of our own, in which the surface forms of special tokens mean these
        tokens."""
        for part in self._tokenizer.split_special(text):
            if isinstance(part, int):
                self._parts.append(part)
            else:
                self.content(part)

    def content(self, text: str) -> None:
        """Append text from outside: ordinary tokens only."""
        if self._parts and isinstance(self._parts[-1], list):
            self._parts[-1].append(text)
        else:
            self._parts.append([text])

    def cut(self) -> None:
        """Encode what follows apart from what came before."""
        self._parts.append([])

    def encode(self) -> list[int]:
        ids: list[int] = []
        for part in self._parts:
            ids += [part] if isinstance(part, int) else self._tokenizer.encode("".join(part))
        return ids


def _separate_turn(tokenizer: Tokenizer, role: str, content: str) -> list[int]:
    """Encode one turn as the original Qwen's `make_context` does."""
    encode = tokenizer.encode
    return [
        tokenizer.im_start,
        *encode(role),
        *encode("\n"),
        *encode(content),
        tokenizer.im_end,
    ]


def _default_system(chat_template: str) -> str | None:
    """Find the system message that a ChatML template writes where the caller gives none."""
    literal = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"]*?)<\|im_end\|>", chat_template)
    return literal[1].replace("\\\\", "\\") if literal else None


def _last_query(messages: Sequence[_Message]) -> int:
    """Index of the last question of the user, as Qwen3's template finds it."""
    for i in range(len(messages) - 1, -1, -1):
        content = messages[i].content
        wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if messages[i].role == "user" and not wrapped:
            return i
    return len(messages) - 1


def _listed(value: object, name: str) -> Sequence[object]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise ValueError(f"{name} is {quoted(value)}, expected a list of dicts")
    return value


def _checked(message: object, index: int) -> _Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {quoted(message)}, expected a dict with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ALLOWED_KEYS:
        raise ValueError(
            f"{where}: role is {quoted(role)}, expected one of {', '.join(_ALLOWED_KEYS)}"
        )
    unknown = [key for key in message if key not in _ALLOWED_KEYS[role]]
    if unknown:
        raise ValueError(
            f"{where}: unknown key {quoted(unknown[0])}, expected "
            f"{', '.join(sorted(_ALLOWED_KEYS[role]))} for role {role!r}"
        )
    calls = message.get("tool_calls")
    checked = tuple(
        _checked_call(call, f"{where}: tool_calls[{i}]")
        for i, call in enumerate(
            _listed(calls, f"{where}: tool_calls") if calls is not None else ()
        )
    )
    content = message.get("content")
    if content is None and checked:
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{where}: content is {quoted(content)}, expected a string")
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"{where}: reasoning_content is {quoted(reasoning)}, expected a string")
    return _Message(role, content, reasoning, checked)


def _checked_call(call: object, where: str) -> _Call:
    if isinstance(call, Mapping) and "function" in call:
        unknown = [key for key in call if key not in ("function", "id", "type")]
        call = call["function"]
    elif isinstance(call, Mapping):
        unknown = []
    if not isinstance(call, Mapping):
        raise ValueError(f"{where} is {quoted(call)}, expected a dict with name and arguments")
    unknown += [key for key in call if key not in ("name", "arguments")]
    if unknown:
        raise ValueError(f"{where}: unknown key {quoted(unknown[0])}, expected name and arguments")
    name, arguments = call.get("name"), call.get("arguments")
    if not isinstance(name, str) or not name or _json(name, where) != f'"{name}"':
        raise ValueError(f"{where}: name is {quoted(name)}, expected a plain non-empty string")
    if not isinstance(arguments, str | Mapping) or _parsed(arguments) is None:
        raise ValueError(f"{where}: arguments is {quoted(arguments)}, expected a JSON object")
    return _Call(name, arguments if isinstance(arguments, str) else dict(arguments))


def _parsed(arguments: str | Mapping[str, object]) -> dict[str, object] | None:
    """Give tool arguments as a dict; None for text that is not a JSON object."""
    if not isinstance(arguments, str):
        return dict(arguments)
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def _json(value: object, where: str) -> str:
    """Write JSON as `transformers` does in templates: unescaped Unicode, keys in their order."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be written as JSON: {error}") from None


def _split_calls(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[ToolCall]]:
    """Separate the valid tool calls in `ids` from the text around them."""
    start_id = tokenizer.special_tokens.get("<tool_call>")
    end_id = tokenizer.special_tokens.get("</tool_call>")
    calls: list[ToolCall] = []
    texts: list[str] = []
    rest: list[int] = []
    start: int | None = None
    for index in ids:
        if index == start_id:
            start = len(rest)
        rest.append(index)
        if index == end_id and start is not None:
            call = _read_call(tokenizer.decode(rest[start + 1 : -1]))
            if call is not None:
                calls.append(call)
                texts.append(tokenizer.decode(rest[:start]))
                rest = []
            start = None
    texts.append(tokenizer.decode(rest))
    if not calls:
        return texts[0], calls
    # Line ends beside a call belong to its scaffolding.
    inner = [texts[0].rstrip("\n"), *(text.strip("\n") for text in texts[1:])]
    return "\n".join(text for text in inner if text), calls


def _read_call(text: str) -> ToolCall | None:
    body = _parsed(text)
    if body is None or body.keys() != {"name", "arguments"}:
        return None
    name, arguments = body["name"], body["arguments"]
    if not isinstance(name, str) or not isinstance(arguments, str | dict):
        return None
    parsed = _parsed(arguments)
    return None if parsed is None else ToolCall(name, parsed)
