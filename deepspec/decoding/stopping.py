"""When the output of a request ends: a stop token, or decoded text that contains a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Token ids to text, as a tokenizer does it. It should keep special tokens, so that every token has text."""

MARGIN = 4  # tokens: room for a character cut in two and for a leading space that some tokenizers drop


class StopCondition:
    """The stop tokens and stop strings of one request.

    Every token is at least a byte of text, so a string of n bytes that ends in new tokens begins at most n tokens
    before them: only that much of the earlier output is decoded again.
    """

    def __init__(self, token_ids: Sequence[int] = (), strings: Sequence[str] = (), decode: Decode | None = None):
        """Args: `decode` is needed for strings only."""
        assert decode or not strings
        self._token_ids = frozenset(token_ids)
        self._strings = tuple(strings)
        self._decode = decode
        self._tail = max((len(string.encode()) for string in strings), default=0) + MARGIN

    def end(self, before: list[int], new: list[int]) -> int | None:
        """How many of the `new` tokens belong to the output, the one that ends it included; None = it goes on.

        Args:
            before: the output so far, which did not end it.
        """
        end = next((i + 1 for i, token in enumerate(new) if token in self._token_ids), None)
        tail, new = before[-self._tail :], new[:end]
        if not self._contains(tail + new):
            return end
        return next(count for count in range(1, len(new) + 1) if self._contains(tail + new[:count]))

    def _contains(self, ids: list[int]) -> bool:
        if self._decode is None or not self._strings:
            return False
        text = self._decode(ids)
        return any(string in text for string in self._strings)
