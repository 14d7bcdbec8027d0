"""A conversation whose assistant turns are written anew, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deepspec.data.conversation import Conversation, Message, with_system_prompt
from deepspec.data.templates import Tools
from deepspec.regeneration.answers import calls_of


@dataclass(frozen=True)
class Task:
    """A conversation of which one answer is wanted."""

    id: str  # of the row that is written, unique
    digest: str  # of the conversation's content
    conversation: Conversation


class Step(NamedTuple):
    """Given turns and the assistant turn that follows them."""

    given: list[Message]
    replaces: Message | None  # the assistant turn of the prompt row; None where it has none


class Dialogue:
    """What of a conversation is written, and what comes next.

    System, user and tool turns stay as they are; assistant turns are replaced. Where there are none at all, each user
    turn gets one. Assistant turns before the first user turn, which answer nothing, are left out, and of assistant
    turns in a row the first stands for all. The results of a tool stay only if the turn that was written calls the tool
    as the replaced one did; else the conversation ends.
    """

    def __init__(self, task: Task, system_prompt: str | None = None):
        """Args: `system_prompt` goes first where the conversation has none."""
        self.task = task
        self.messages: list[Message] = []
        self.turn = 0  # how many assistant turns are written
        self.is_cut = False
        self._pending: list[Message] = []
        self._steps = deque(_steps(with_system_prompt(task.conversation.messages, system_prompt)))

    @property
    def tools(self) -> Tools:
        return self.task.conversation.tools

    def next_prompt(self) -> list[Message] | None:
        """The turns so far, behind which the assistant is to write; None at the end."""
        if self.is_cut or not self._steps:
            return None
        self._pending = self._steps[0].given
        return [*self.messages, *self._pending]

    def take(self, message: Message) -> None:
        """The assistant's turn, written behind the last `next_prompt`."""
        step = self._steps.popleft()
        self.messages += [*self._pending, message]
        self.turn += 1
        self.is_cut = message.get("finish_reason") == "length"
        follows = self._steps[0].given[0]["role"] if self._steps else None
        if follows == "tool" and (not calls_of(message) or calls_of(message) != calls_of(step.replaces or {})):
            self._steps.clear()

    def end(self) -> None:
        """Let what is written be all."""
        self._steps.clear()

    def row(self, target: str) -> dict[str, Any]:
        """As it is saved.

        Args:
            target: a short name of who wrote it.
        """
        conversation = self.task.conversation
        row: dict[str, Any] = {"id": self.task.id}
        if "source" in conversation.row:
            row["source"] = conversation.row["source"]
        row["messages"] = self.messages
        if conversation.tools:
            row["tools"] = conversation.tools
        return row | {
            "finish_reason": self.messages[-1]["finish_reason"],
            "target": target,
            "prompt": self.task.digest,
        }


def _steps(messages: Sequence[Message]) -> list[Step]:
    has_answers = any(message["role"] == "assistant" for message in messages)
    steps: list[Step] = []
    given: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            if given and (steps or _asks(given)):
                steps.append(Step(given, message))
                given = []
            continue
        if message["role"] == "user" and not has_answers and _asks(given):
            steps.append(Step(given, None))
            given = []
        given.append(message)
    if _asks(given):
        steps.append(Step(given, None))
    return steps


def _asks(given: Sequence[Message]) -> bool:
    return any(message["role"] in ("user", "tool") for message in given)
