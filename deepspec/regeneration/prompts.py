"""Prompt files to conversations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

from deepspec.data.conversation import Conversation
from deepspec.data.jsonl import DataError, read_jsonl


def read_prompts(files: Sequence[str]) -> Iterator[Conversation]:
    """Conversations of JSONL files, in order.

    Raises:
        DataError: a bad file or line.
    """
    for file in files:
        for place, row in read_jsonl(file):
            messages = row.get("messages")
            if not isinstance(messages, list) or not messages:
                raise DataError(f"{place}: expected a non-empty list under 'messages', found the keys {sorted(row)}")
            for number, message in enumerate(messages):
                if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                    raise DataError(f"{place}: message {number} needs a string under 'role', found {message!r:.80}")
            digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
            yield Conversation(str(row.get("id", digest)), messages, row.get("tools"), place, row)
