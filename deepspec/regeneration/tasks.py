"""The rows that are wanted: each prompt as often as it is to be answered, under ids that are unique and stay."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

from deepspec.data.conversation import Conversation
from deepspec.regeneration.dialogue import Task


def digest_of(conversation: Conversation) -> str:
    """Of what is asked, whatever the id."""
    text = json.dumps([conversation.messages, conversation.tools], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Names:
    """Unique ids for prompts, the same ones in every run of a folder, whatever else is asked there and in which order.

    A prompt whose id another prompt has already gets a part of its digest behind it, a copy a number.
    """

    def __init__(self, known: Mapping[str, str]):
        """Args: `known` ids of earlier runs, as they were given here, and the digests of their prompts."""
        self._owner = dict(known)
        self._names: dict[str, set[str]] = {}  # by digest, those of earlier runs that are not given out yet
        for name, digest in known.items():
            self._names.setdefault(digest, set()).add(name)
        self.renamed = 0

    def name(self, id: str, digest: str) -> str:
        """The id of the next prompt with this content."""
        earlier = self._names.get(digest, set())
        own = [name for name in earlier if name == id or name.startswith(f"{id}~{digest[:8]}")]
        name = min(own) if own else next(each for each in self._candidates(id, digest) if each not in self._owner)
        earlier.discard(name)
        self._owner[name] = digest
        self.renamed += name != id
        return name

    @staticmethod
    def _candidates(id: str, digest: str) -> Iterator[str]:
        yield id
        yield f"{id}~{digest[:8]}"
        number = 2
        while True:
            yield f"{id}~{digest[:8]}.{number}"
            number += 1


def tasks_of(
    conversations: Iterable[Conversation], known: Mapping[str, str], answers: int, counts: Counter[str] | None = None
) -> Iterator[Task]:
    """Each conversation `answers` times: as ID, or as ID#1, ID#2, ...

    Args:
        known: digests by id of the rows that earlier runs have written.
        counts: gets `prompts`, and `renamed` of them.
    """
    names = Names({base_id(id, answers): digest for id, digest in known.items()})
    for conversation in conversations:
        digest = digest_of(conversation)
        name = names.name(conversation.id, digest)
        if counts is not None:
            counts["prompts"] += 1
            counts["renamed"] = names.renamed
        for number in range(answers):
            yield Task(f"{name}#{number + 1}" if answers > 1 else name, digest, conversation)


def base_id(id: str, answers: int) -> str:
    """Of the prompt that a row answers."""
    return id.rsplit("#", 1)[0] if answers > 1 else id


def share_of(tasks: Iterable[Task], is_done: Callable[[str], bool], rank: int, ranks: int) -> Iterator[Task]:
    """This rank's part of what is left."""
    left = (task for task in tasks if not is_done(task.id))
    yield from islice(left, rank, None, ranks)
