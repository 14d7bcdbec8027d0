"""Answers of a log to rows to train on, such that no answer is trained on twice.

A chat of several turns is logged once per turn, each time with all that was said before. Its longest request is kept;
the answers in its history are trained on there, once, if the log itself shows that the target gave them. Any other
answer in a history (an example, another model's, one that two branches of a chat share and that is trained on in the
first) gets `"weight": 0`, as in OpenAI's fine-tuning format: it is context. An answer with reasoning keeps a row of its
own, since templates and clients drop the reasoning of earlier turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from deepspec.data.conversation import Message
from deepspec.data.prompts import text_of

Digest = bytes  # of a conversation up to one of its answers
UNTRAINED = {"weight": 0}
CUT = {"finish_reason": "length"}  # of an assistant message: it ends without an end-of-turn token


class LoggedChats:
    """Knows all rows of a log by digests, 16 bytes for an answer. First `add` every row, then ask `once` of each, in
    the same order.

    A row is {"messages": [..., answer], "tools"?, ...}.
    """

    def __init__(self) -> None:
        self.duplicates = self.continued = 0
        self._cut: dict[Digest, bool] = {}  # answers without reasoning: whether they were cut
        self._histories: set[Digest] = set()  # conversations that a request went on from
        self._seen: set[Digest] = set()
        self._trained: set[Digest] = set()

    def add(self, row: dict[str, Any]) -> None:
        *history, (_, own) = _answers(row)
        answer = row["messages"][-1]
        if not _reasoned(answer):
            self._cut[own] = self._cut.get(own, True) and CUT.items() <= answer.items()
        self._histories.update(digest for _, digest in history)

    def once(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The row as it is to be trained on; None if its answer is trained on in another."""
        *history, (_, own) = _answers(row)
        answer = row["messages"][-1]
        exact = hashlib.blake2b(own + json.dumps(_reasoned(answer)).encode(), digest_size=16).digest()
        if exact in self._seen:
            self.duplicates += 1
            return None
        self._seen.add(exact)
        if own in self._histories and not _reasoned(answer):
            self.continued += 1
            return None
        messages = list(row["messages"])
        for place, digest in history:
            messages[place] = messages[place] | self._mark(digest)
        return row | {"messages": messages}

    def _mark(self, digest: Digest) -> dict[str, Any]:
        """What is added to an answer in a history."""
        if digest not in self._cut or digest in self._trained:
            return UNTRAINED
        self._trained.add(digest)
        return CUT if self._cut[digest] else {}


def _answers(row: dict[str, Any]) -> list[tuple[int, Digest]]:
    """Where the assistant's messages of a row are, and the digest of the conversation up to each."""
    return list(_digests(row["messages"], row.get("tools")))


def _digests(messages: Sequence[Message], tools: Any) -> Iterator[tuple[int, Digest]]:
    so_far = hashlib.blake2b(json.dumps(tools, sort_keys=True).encode(), digest_size=16)
    for place, message in enumerate(messages):
        calls = [[call["function"].get("name"), call["function"].get("arguments")] for call in _calls(message)]
        said = [message["role"], _text(message).strip(), calls]
        so_far.update(json.dumps(said, sort_keys=True).encode())
        if message["role"] == "assistant":
            yield place, so_far.digest()


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _text(message: Message) -> str:
    return "" if message.get("content") is None else text_of(message)


def _reasoned(answer: Message) -> str:
    """The reasoning before an answer, wherever the server put it."""
    content = _text(answer)
    return answer.get("reasoning_content") or (content if "</think>" in content else "")
