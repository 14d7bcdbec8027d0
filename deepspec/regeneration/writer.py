"""The one interface behind which the target writes, in this process or on servers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from deepspec.data.conversation import Message
from deepspec.data.jsonl import DataError
from deepspec.data.templates import Tools


class WriterError(DataError):
    """Nobody is left who writes. What is finished is on disk, and the same command goes on from there."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float  # 0 = greedy
    top_p: float  # 1 = off
    top_k: int  # 0 = off
    min_p: float  # 0 = off
    max_new_tokens: int


@dataclass(frozen=True)
class Question:
    """A text that the target goes on writing."""

    key: str  # of the row; no two questions under way have the same
    prompt_ids: list[int]
    seed: int
    max_new_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    messages: Sequence[Message] | None = None  # the same as turns, for servers that only chat
    tools: Tools = None


@dataclass(frozen=True)
class Answer:
    """What the target wrote."""

    raw: str | None  # exactly, control tokens included; None where a server only says what it understood
    tokens: int
    finish_reason: str  # stop or length
    message: dict[str, Any] = field(default_factory=dict)  # content, ... as a server that only chats has parsed it


@dataclass(frozen=True)
class Refusal:
    """Why there is no answer."""

    reason: str
    is_final: bool = True  # it would be refused again; else the next run asks again


Outcome: TypeAlias = tuple[Question, Answer | Refusal]


class Writer(Protocol):
    """Takes questions and gives them back with what was written, in any order."""

    limit: int  # positions that a prompt and what follows it may have together

    @property
    def room(self) -> int:
        """How many more questions it can use now."""

    @property
    def in_flight(self) -> int:
        """Questions that are being answered."""

    @property
    def tokens_under_way(self) -> int:
        """Tokens of answers that are not finished, as far as it knows."""

    def put(self, question: Question) -> None:
        """Let it be answered."""

    def wait(self) -> list[Outcome]:
        """What has ended; may be nothing yet.

        Raises:
            WriterError: nobody answers any more.
            ConfigError: what was configured cannot work.
        """

    def close(self) -> None:
        """Give up what is under way."""


def seed_of(seed: int, key: str, turn: int) -> int:
    """A random stream of its own for each turn of each row, whatever else is in the batch."""
    digest = hashlib.sha256(f"{seed}/{key}/{turn}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
