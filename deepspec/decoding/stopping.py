"""When the output of a request ends: a stop token, or decoded text that contains a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Token ids to text, as a tokenizer does it. It should keep special tokens, so that every token has text."""

UNREADABLE = "\ufffd"  # what decoding makes of a cut character; some tokenizers spoil the bytes around it as well
CUT = 3  # tokens: a character is at most four bytes, and the last ones of a cut one are at most three tokens
MARGIN = CUT + 1  # tokens: one more for a leading space, which some tokenizers drop


class StopCondition:
    """The stop tokens and stop strings of one request.

    Every token is at least a byte of text, so a string of n bytes that ends in new tokens begins less than n tokens
    before them: only that much of the earlier output is decoded again, and a few tokens more.
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
        if self._decode is None or not self._strings:
            return end
        tail, new = before[-self._tail :], new[:end]
        text = self._decode(tail + new)
        if not self._is_in(text) and UNREADABLE not in text:
            return end
        return next((count for count in range(1, len(new) + 1) if self._ends(tail, new[:count])), end)

    def _ends(self, tail: list[int], new: list[int]) -> bool:
        """Whether the text contains a stop string, read from wherever a character begins."""
        assert self._decode is not None
        for skipped in range(min(CUT, len(tail)) + 1):
            text = self._decode(tail[skipped:] + new)
            if self._is_in(text) or UNREADABLE not in text:
                return self._is_in(text)
        return False

    def _is_in(self, text: str) -> bool:
        return any(string in text for string in self._strings)
