"""What a chat template does with a conversation: its text, the assistant's part of it, and where a turn ends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise, product
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from deepspec.config import ConfigError
from deepspec.data.conversation import Message, with_system_prompt

Tools = Sequence[dict[str, Any]] | None
Span = tuple[int, int]  # first character, one behind the last

MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|〈[^〈〉\s]+〉")  # how templates write control tokens
LONGEST_MARKER = 64  # characters
OPENING = re.compile(r"start|begin|open", re.IGNORECASE)  # names of those that begin a turn
USER, ASSISTANT, AGAIN = "first question", "given answer", "second question"  # of a probe
RESERVED = {"messages", "tools", "documents", "conversations", "chat_template", "add_generation_prompt", "tokenize"} | {
    "continue_final_message",
    "return_assistant_tokens_mask",
}  # what the rendering itself says
OURS = ("raw", "finish_reason", "weight")  # keys of messages that templates need not see


class TemplateError(ValueError):
    """A chat template that refuses a conversation or does not show what is in it. The message says which and why."""


@dataclass(frozen=True)
class Ending:
    """How an assistant's turn ends, found out with a conversation of two sentences."""

    tail: str  # behind the answer when it is the last turn
    end_of_turn: str  # what the target writes to end its turn: a beginning of the tail, or not shown there at all


class ChatTemplate:
    """The template of a tokenizer with its options and system prompt."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        name: str = "the chat template",
    ):
        """
        Args:
            system_prompt: goes first in conversations that have no system message.
            name: for messages.
        """
        self.name = name
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        if reserved := RESERVED & self.options.keys():
            raise ConfigError(f"data.template_options.{min(reserved)}: is not an option of the template; leave it out")
        self.system_prompt = system_prompt or None

    def source(self, tools: Tools) -> str:
        """The template itself; of several, the one for conversations with or without tools.

        Raises:
            TemplateError: the tokenizer has none.
        """
        try:
            return self.tokenizer.get_chat_template(None, list(tools) if tools else None)
        except ValueError as error:
            named = self.tokenizer.chat_template
            if isinstance(named, dict):
                raise TemplateError(
                    f"the tokenizer has the chat templates {sorted(named)} and none is called 'default'; give one with "
                    "data.chat_template=FILE.jinja"
                ) from error
            raise TemplateError(
                "the tokenizer has no chat template, so a conversation cannot become text; give one with "
                "data.chat_template=FILE.jinja"
            ) from error

    def has_markers(self, tools: Tools) -> bool:
        """Whether the template says itself, with `{% generation %}`, what the assistant wrote."""
        return _has_markers(self.source(tools))

    def with_system_prompt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages behind the system prompt, unless they have one of their own."""
        return with_system_prompt(messages, self.system_prompt)

    def readable(self, messages: Sequence[Message], tools: Tools) -> list[Message]:
        """The messages in the form that this template shows in full.

        Templates differ in what they read: absent content as None, left out or as ""; the arguments of a tool call as
        an object or as JSON; text as a string or as a list of parts. The first form that shows every tool call counts.

        Raises:
            TemplateError: the template refuses all of them, or a message holds more than text.
        """
        plain = [_plain(number, message) for number, message in enumerate(messages)]
        if not self.reads_strings:
            plain = [{**m, "content": [{"type": "text", "text": m["content"]}]} if m["content"] else m for m in plain]
        forms = list(_forms(plain))
        if len(forms) == 1:
            return forms[0]
        failures = []
        for form in forms:
            try:
                if self._shows_calls(form, tools):
                    return form
            except TemplateError as error:
                failures.append(error)
        if len(failures) == len(forms):
            raise failures[0]
        raise TemplateError(f"{self.name} leaves out a tool call; give one that shows it")

    def _shows_calls(self, messages: list[Message], tools: Tools) -> bool:
        """Whether every tool call is in the text, and no absent content as the word None."""
        text = self.text(messages, tools)
        if "None" in text and "None" not in json.dumps([messages, tools]):
            return False
        called = [call["function"] for message in messages for call in message.get("tool_calls") or []]
        arguments = [function["arguments"] for function in called if isinstance(function.get("arguments"), str)]
        if any(json.dumps(value)[1:-1] in text for value in arguments if '"' in value):  # JSON within JSON
            return False
        for number, message in enumerate(messages):
            if message.get("tool_calls"):
                silent = {"content": "", **{key: value for key, value in message.items() if key != "tool_calls"}}
                with suppress(TemplateError):
                    if self.text([*messages[:number], silent, *messages[number + 1 :]], tools) == text:
                        return False
        return all(str(function.get("name")) in text for function in called)

    @cached_property
    def reads_strings(self) -> bool:
        """Whether a message's text may be a string; some templates for images and text read lists of parts alone."""
        try:
            return USER in self.text([{"role": "user", "content": USER}], None)
        except TemplateError:
            return True

    def text(self, messages: Sequence[Message], tools: Tools, *, is_prompt: bool = False) -> str:
        """The conversation as text; of a prompt, with the opening of the assistant's next turn.

        Raises:
            TemplateError: the template refuses it.
        """
        return self._render(messages, tools, is_prompt=is_prompt)[0]

    def marked(self, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        """The conversation as text, and what the template's markers enclose.

        Raises:
            TemplateError: the template refuses it.
        """
        return self._render(messages, tools, with_spans=True)

    def _render(
        self, messages: Sequence[Message], tools: Tools, *, is_prompt: bool = False, with_spans: bool = False
    ) -> tuple[str, list[Span]]:
        options = {**self.tokenizer.special_tokens_map, "add_generation_prompt": is_prompt, **self.options}
        render = partial(
            render_jinja_template,
            [list(messages)],
            chat_template=self.source(tools),
            return_assistant_tokens_mask=with_spans,
            **options,
        )
        rendered: Any  # the texts, and of each what the markers enclose
        try:
            try:
                rendered = render(tools=list(tools) if tools else None)
            except (TypeError, jinja2.UndefinedError):  # some loop over the tools without asking whether there are any
                if tools:
                    raise
                rendered = render(tools=[])
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{self.name} is no valid Jinja: line {error.lineno}, {error.message}") from error
        except (jinja2.UndefinedError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise TemplateError(f"{self.name} cannot render it: {error}") from error
        except (jinja2.TemplateError, ValueError) as error:
            raise TemplateError(f'{self.name} refuses it: "{error}"') from error
        texts, spans = rendered
        return texts[0], list(spans[0]) if with_spans else []

    @cached_property
    def ending(self) -> Ending:
        """How this template ends an answer.

        Raises:
            TemplateError: it does not even show a question with its answer.
        """
        asked: list[Message] = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
        last = self.text(self.readable(asked, None), None)
        before, found, tail = last.rpartition(ASSISTANT)
        if not found or USER not in before:
            raise TemplateError(f"{self.name} does not show a question with its answer, but only {last!r:.200}")
        try:
            longer = self.text(self.readable([*asked, {"role": "user", "content": AGAIN}], None), None)
        except TemplateError:
            longer = ""
        gap = longer.partition(ASSISTANT)[2].rpartition(AGAIN)[0]
        return Ending(tail, self._end_of_turn(tail, gap))

    def _end_of_turn(self, tail: str, gap: str) -> str:
        """
        Args:
            tail: behind the last answer.
            gap: between an answer and the next question.
        """
        if not tail.strip(" \n"):
            first = MARKER.search(gap)
            if first is None:
                return tail or str(self.tokenizer.eos_token or "")
            return gap[: first.end()]
        shared = whole_markers(tail, shared_length(tail, gap))
        markers = list(MARKER.finditer(shared))
        while len(markers) > 1 and markers[-1].end() == len(shared.rstrip()) and OPENING.search(markers[-1].group()):
            shared = shared[: markers.pop().start()]
        if shared.strip():
            return shared.rstrip()
        first = MARKER.search(tail)
        if first:
            return tail[: first.end()]
        return tail.rstrip() if not gap else shared or str(self.tokenizer.eos_token or "")


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    shortest = min(len(one), len(other))
    low, high = 0, shortest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[:middle] == other[:middle] else (low, middle - 1)
    return low


def whole_markers(text: str, length: int) -> str:
    """The first `length` characters, less where they end within a control token."""
    for marker in MARKER.finditer(text, max(0, length - LONGEST_MARKER)):
        if marker.start() < length < marker.end():
            return text[: marker.start()]
    return text[:length]


@lru_cache(maxsize=64)
def _has_markers(source: str) -> bool:
    """Whether a template has a generation block, however it is spelled; one in a comment does not count."""
    try:
        tokens = [(kind, text) for _, kind, text in jinja2.Environment().lex(source) if kind != "whitespace"]
    except jinja2.TemplateSyntaxError:
        return False
    return any(
        kind == "block_begin" and following == ("name", "generation") for (kind, _), following in pairwise(tokens)
    )


def _plain(number: int, message: Message) -> Message:
    """Without what is ours, and with the text of content parts as a string.

    Raises:
        TemplateError: a part that is not text.
    """
    kept = {key: value for key, value in message.items() if key not in OURS}
    content = kept.setdefault("content", None)
    if isinstance(content, list):
        texts: list[str] = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise TemplateError(f"message {number} has a content part of type {kind!r}: only text can be learned")
            texts.append(text)
        kept["content"] = "".join(texts)
    return kept


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The ways of writing absent content and the arguments of tool calls, the most usual one first."""
    has_absent = any(message["content"] is None for message in messages)
    has_calls = any(message.get("tool_calls") for message in messages)
    absents = ("none", "left out", "empty") if has_absent else ("none",)
    for absent, as_json in product(absents, (False, True) if has_calls else (False,)):
        form = [_with_arguments(message, as_json) if message.get("tool_calls") else message for message in messages]
        if absent != "none":
            form = [_without_content(message, absent) if message["content"] is None else message for message in form]
        yield form


def _without_content(message: Message, absent: str) -> Message:
    rest = {key: value for key, value in message.items() if key != "content"}
    return rest if absent == "left out" else {**rest, "content": ""}


def _with_arguments(message: Message, as_json: bool) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or call)
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str) and not as_json:
                function["arguments"] = json.loads(arguments)
            elif arguments is not None and not isinstance(arguments, str) and as_json:
                function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        except ValueError:  # not JSON: as the model wrote it
            pass
        calls.append({"type": "function", **(call if "function" in call else {}), "function": function})
    return {**message, "tool_calls": calls}
