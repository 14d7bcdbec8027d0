"""Rows of prompt sets: what is said to a model, and where it is to answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepspec.data.conversation import Message
from deepspec.data.jsonl import DataError
from deepspec.data.surrogates import mend
from deepspec.data.turns import messages_of, tools_of

ORIGINALS = ("question", "problem", "prompt", "instruction", "question_content", "task_id")  # keys of public sets
ASKING = ("user", "tool")  # roles of messages that the model answers
EXPECTED = '{"turns": ["...", ...]} or {"messages": [{"role": "user", "content": "..."}, ...]}'


@dataclass(frozen=True)
class PromptRow:
    """One prompt, of one or several turns.

    `given[k]` are the messages behind the model's answer k - 1 and before its answer k: the first ones begin with the
    system message, if there is one, and the last message of each is what the model answers.
    """

    given: list[list[Message]]
    tools: list[dict[str, Any]] | None = None  # functions that the model may call

    @property
    def first_turn(self) -> str:
        """The text that the first answer is to."""
        return text_of(self.given[0][-1])


def text_of(message: Message) -> str:
    """What a message says; of a list of parts, the texts."""
    content = message["content"]
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return str(content)


def read_prompt(row: dict[str, Any], place: str) -> PromptRow:
    """A row `{"turns": [...], "system"?, "tools"?}` or `{"messages": [...], "tools"?}`.

    Each user message (or tool result) without an answer is a turn that the model answers. Answers that the messages
    hold are history and are kept as they are, except at the end, where the model's own takes their place.

    Args:
        place: "FILE, line N", for messages.

    Raises:
        DataError: naming the place and what is wrong.
    """
    row = mend(row)
    messages = row.get("messages")
    if row.get("turns") is not None:
        given = [[message] for message in _user_messages(row["turns"], place)]
    elif messages is not None:
        given = _split_at_answers(_checked_messages(messages, place), place)
    else:
        raise DataError(f"{place}: expected {EXPECTED}; found the keys {sorted(row)}{_hint(row)}")
    given[0] = [*_system_message(row.get("system"), given[0], place), *given[0]]
    return PromptRow(given, tools_of(place, "tools", row.get("tools")))


def _hint(row: dict[str, Any]) -> str:
    if not set(row) & set(ORIGINALS):
        return ""
    return ". Rows of a public set as it is published become prompts with `python -m data_prep.eval_sets`"


def _user_messages(turns: Any, place: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}: expected a list with at least one turn under 'turns', found {turns!r:.80}")
    return [
        {"role": "user", "content": _checked_text(turn, f"{place}: turn {number}")}
        for number, turn in enumerate(turns, start=1)
    ]


def _checked_text(text: Any, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{what} must be a non-empty text, found {text!r:.80}")
    return text


def _checked_messages(messages: Any, place: str) -> list[Message]:
    checked = messages_of(place, "messages", messages)
    for number, message in enumerate(checked):
        if message["role"] in ("system", "user") and not isinstance(message["content"], list):
            _checked_text(message["content"], f"{place}: messages[{number}] ({message['role']})")
    return checked


def _split_at_answers(messages: list[Message], place: str) -> list[list[Message]]:
    """What stands before each answer that is to be written."""
    messages = list(messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] not in ASKING:
        raise DataError(f"{place}: the messages must end with one that the model answers, from {' or '.join(ASKING)}")
    given: list[list[Message]] = [[]]
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        given[-1].append(message)
        last_of_its_kind = following is None or following["role"] not in ("assistant", "tool")
        if message["role"] in ASKING and last_of_its_kind:
            given.append([])
    return given[:-1]


def _system_message(system: Any, first: list[Message], place: str) -> list[Message]:
    if system is None:
        return []
    if any(message["role"] == "system" for message in first):
        raise DataError(f"{place}: a system prompt under 'system' and another among the messages; keep one")
    return [{"role": "system", "content": _checked_text(system, f"{place}: 'system'")}]
