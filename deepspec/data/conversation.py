"""A conversation as the project passes it around, whatever file or format it was read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Turns in the form of the OpenAI API, which is what chat templates read.

    A message has `role` (system, user, assistant, tool, ...) and `content` (a string, a list of parts, or None beside
    `tool_calls`), and may have whatever else templates read (`tool_calls`, `name`, `reasoning_content`).
    An assistant message that a target wrote also has `raw`: the exact text behind the generation prompt, control tokens
    and the end of the turn included. An answer that was cut ends without one.
    """

    id: str  # of the row; a digest of the content where the row has none
    messages: list[Message]
    tools: list[dict[str, Any]] | None  # functions that the assistant may call, as JSON schemas
    place: str  # "FILE, line N", for messages to the user
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as it was read


def with_system_prompt(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """The messages behind a system prompt, unless there is none or they have one of their own."""
    if system_prompt is None or any(message.get("role") in ("system", "developer") for message in messages):
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]
