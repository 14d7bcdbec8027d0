"""The elements of a JSON array one by one, from a file of any size.

Not with ijson: its parser turns a lone surrogate into "?" without a word, and does not say where a mistake is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from deepspec.data.jsonl import DataError

CHUNK = 2**20  # characters read at a time
LONGEST_ELEMENT = 2**26  # characters; a mistake is looked for within them
BLANKS = re.compile(r"[ \t\r\n]*")


def read_array(text: IO[str], name: str) -> Iterator[tuple[int, int, Any]]:
    """Yield (number, line, value) of the elements, counted from 1.

    Args:
        name: of the file, for messages.

    Raises:
        DataError: the file is not one whole array; the message names the element and the line.
    """
    reader = _Reader(text, name)
    reader.expect("[")
    if reader.peek() == "]":
        reader.expect("]")
    else:
        while True:
            reader.number += 1
            reader.peek()
            yield reader.number, reader.line, reader.value()
            if reader.expect(",", "]") == "]":
                break
    if reader.peek():
        raise reader.malformed("text behind the array's end")


class _Reader:
    """A window on the text: `at` is what comes next, `line` is the line of it."""

    def __init__(self, text: IO[str], name: str):
        self.number, self.line = 0, 1
        self._text, self._name = text, name
        self._window, self._at = "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not blank, or "" at the end."""
        while True:
            blanks = BLANKS.match(self._window, self._at)
            assert blanks is not None
            self._advance(blanks.end())
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._read_on():
                return ""

    def expect(self, *marks: str) -> str:
        mark = self.peek()
        if mark not in marks:
            raise self.malformed(f"expected {' or '.join(marks)}, found {mark!r}" if mark else "the array has no end")
        self._advance(self._at + 1)
        return mark

    def value(self) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except json.JSONDecodeError as error:
                offset = error.pos - self._at
                if len(self._window) - self._at > LONGEST_ELEMENT or not self._read_on():
                    self._advance(min(self._at + offset, len(self._window)))
                    raise self.malformed(error.msg) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand levels
                raise self.malformed(str(error)) from error
            else:
                self._advance(end)
                return value

    def malformed(self, what: str) -> DataError:
        near = self._window[self._at : self._at + 40]
        at = f" at {near!r}" if near else " at the end of the file"
        return DataError(
            f"{self._name}, row {max(self.number, 1)} (line {self.line}): malformed JSON: {what}{at}; "
            "mend the array, or write one object a line"
        )

    def _advance(self, end: int) -> None:
        self.line += self._window.count("\n", self._at, end)
        self._at = end

    def _read_on(self) -> bool:
        """Widen the window, at least twofold so that a long element is not tried too often; False at the end."""
        rest = self._window[self._at :]
        more = self._text.read(max(CHUNK, len(rest)))
        self._window, self._at = rest + more, 0
        return bool(more)
