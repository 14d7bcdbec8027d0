"""A pool of prompts without duplicates, from which a mix is drawn. Texts wait on disk, signatures too."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import xxhash

from deepspec.data.contamination import EvaluationPrompts, text_of
from deepspec.data.conversation import Conversation, Message
from deepspec.data.corpus import is_held_out
from deepspec.data.formats import content_id
from deepspec.data.jsonl import RowError
from deepspec.data.near_duplicates import PERMUTATIONS, Signer, find_near_duplicates
from deepspec.data.words import digest_of, hash_words


def prompt_of(messages: Sequence[Message]) -> list[Message]:
    """The messages up to the last user turn; earlier assistant turns stay, so that regeneration knows where they go."""
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return list(messages[: users[-1] + 1]) if users else []


class PromptPool:
    """Prompts in the order in which they were added, each compared with all before it.

    What is the same or nearly the same is decided by the user turns alone. What is not taken is written to
    `removed`, one JSON object a line: id, source, place, reason, and what it collides with.

    Args:
        rows: an empty file for the prompts, to write and read.
        signatures: another, for 512 bytes a prompt.
        removed: where to write what is not taken.
        evaluation: prompts that must not be in the pool, if there are any.
    """

    def __init__(
        self,
        rows: IO[bytes],
        signatures: IO[bytes],
        removed: IO[str],
        *,
        seed: int,
        held_out_fraction: float,
        evaluation: EvaluationPrompts | None,
    ):
        self._rows, self._signatures = rows, signatures
        self._removed, self._evaluation = removed, evaluation
        self._seed, self._held_out_fraction = seed, held_out_fraction
        self._signer = Signer()
        self._ids: list[str] = []
        self._taken_ids: set[str] = set()
        self._by_text: dict[int, int] = {}  # hash of the user turns -> index
        self._offsets, self._sources = array("Q"), array("H")
        self._order, self._held_out = array("Q"), array("B")  # of the draw; whether measured rather than trained on
        self._names: list[str] = []
        self._alive = np.empty(0, bool)
        self.removed: Counter[tuple[str, str]] = Counter()  # (source, reason) -> prompts

    def __len__(self) -> int:
        return len(self._ids)

    def refuse(self, source: str, error: RowError) -> None:
        """List a row that cannot be read."""
        self._remove(None, source, None, "bad_row", detail=str(error))

    def add(self, source: str, conversation: Conversation) -> None:
        """Take the prompt of a conversation, or list why not."""
        if not self._names or self._names[-1] != source:
            self._names.append(source)
        messages = prompt_of(conversation.messages)
        known = conversation.id, source, conversation.place
        texts = [hash_words(text_of(message)) for message in messages]
        users = [text for text, message in zip(texts, messages, strict=True) if message["role"] == "user"]
        words = np.concatenate(users) if users else np.empty(0, np.uint64)
        if not len(words):
            return self._remove(*known, "no_user_text")
        if self._evaluation:
            found = (self._evaluation.find(text) for text in texts if len(text))
            if place := next(filter(None, found), None):
                return self._remove(*known, "evaluation_prompt", collides_with=place)
        text = digest_of(words)
        if text in self._by_text:
            return self._remove(*known, "duplicate", collides_with=self._ids[self._by_text[text]])
        self._by_text[text] = len(self)
        self._offsets.append(self._rows.tell())
        self._sources.append(len(self._names) - 1)
        self._order.append(xxhash.xxh3_64_intdigest(f"{self._seed}:{text}".encode()))
        self._held_out.append(is_held_out(f"{digest_of(users[0]):016x}", self._seed, self._held_out_fraction))
        self._signatures.write(self._signer.sign(words).tobytes())
        row: dict[str, Any] = {"id": self._unique_id(conversation.id, messages), "source": source, "messages": messages}
        row |= {"tools": conversation.tools} if conversation.tools else {}
        self._rows.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
        self._rows.write(conversation.place.encode(errors="replace") + b"\n")

    def _unique_id(self, given: str, messages: list[Message]) -> str:
        """The row's own id, with a digest behind it where another source's row has the same."""
        name = f"{given}-{content_id(messages)[:12]}" if given in self._taken_ids else given
        self._taken_ids.add(name)
        self._ids.append(name)
        return name

    def _remove(self, id: str | None, source: str, place: str | None, reason: str, **more: Any) -> None:
        self.removed[source, reason] += 1
        line = {"id": id, "source": source, "place": place, "reason": reason, **more}
        self._removed.write(json.dumps(line) + "\n")

    def drop_near_duplicates(self, threshold: float) -> None:
        """List and drop what is at least `threshold` similar (Jaccard, of runs of three words) to an earlier prompt.

        Nothing is at a threshold of 1.
        """
        self._signatures.flush()
        self._alive = np.ones(len(self), bool)
        if not len(self) or threshold == 1:
            return
        signatures: np.ndarray = np.memmap(self._signatures, dtype=np.uint32, mode="r", shape=(len(self), PERMUTATIONS))
        for near in find_near_duplicates(signatures, threshold):
            self._alive[near.index] = False
            self._remove(
                self._ids[near.index],
                self._names[self._sources[near.index]],
                self._read(near.index)[1],
                "near_duplicate",
                collides_with=self._ids[near.earlier],
                similarity=round(near.similarity, 3),
            )

    def draw(self, count: int | None, shares: Sequence[float] | None) -> tuple[np.ndarray, list[str]]:
        """A random draw that depends on the seed and the texts alone: indices in the order to write, and what is short.

        Args:
            count: prompts; None = as many as there are.
            shares: of the sources, in the order in which they were added; None = as they are there.
        """
        order = np.argsort(np.frombuffer(self._order, np.uint64), kind="stable") if len(self) else np.empty(0, int)
        order = order[self._alive[order]]
        if shares is None:
            short = [] if count is None or count <= len(order) else [f"{len(order)} prompts are left of {count} wanted"]
            return order[:count], short
        sources = np.frombuffer(self._sources, np.uint16)[order]
        available = np.bincount(sources, minlength=len(shares))
        parts = np.array(shares) / sum(shares)
        total = int(min(available / parts) + 1e-9) if count is None else count
        wanted = np.diff(np.round(np.cumsum(parts) * total), prepend=0).astype(int)
        rank = np.empty(len(order), int)
        for source in range(len(shares)):
            rank[sources == source] = np.arange(available[source])
        short = [
            f"{name}: {there} prompts are left of {quota} wanted"
            for name, there, quota in zip(self._names, available, wanted, strict=True)
            if there < quota
        ]
        return order[rank < wanted[sources]], short

    def write(self, chosen: np.ndarray, train: IO[str], held_out: IO[str]) -> dict[str, Counter[str]]:
        """Write the chosen prompts to the file of their part. Returns the prompts of every source in each part."""
        counts = {"train": Counter[str](), "heldout": Counter[str]()}
        for index in chosen.tolist():
            part, file = ("heldout", held_out) if self._held_out[index] else ("train", train)
            file.write(self._read(index)[0])
            counts[part][self._names[self._sources[index]]] += 1
        return counts

    def _read(self, index: int) -> tuple[str, str]:
        """The line of a prompt, and its place."""
        self._rows.seek(self._offsets[index])
        return self._rows.readline().decode(), self._rows.readline().decode().rstrip("\n")
