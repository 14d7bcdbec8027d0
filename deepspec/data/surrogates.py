"""Halves of surrogate pairs, which JSON can hold (`"\\ud83d"`, of an emoji that was cut) and no tokenizer can read."""

from __future__ import annotations

import re
from typing import Any

HALF = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"


def has_half(value: Any) -> bool:
    """Whether a JSON value holds a half anywhere; cheaper than to mend it."""
    if isinstance(value, str):
        return not value.isascii() and HALF.search(value) is not None
    if isinstance(value, list):
        return any(map(has_half, value))
    return isinstance(value, dict) and (any(map(has_half, value.values())) or any(map(has_half, value)))


def mend(value: Any) -> Any:
    """A JSON value with U+FFFD for every half."""
    if isinstance(value, str):
        return value if value.isascii() else HALF.sub(REPLACEMENT, value)
    if isinstance(value, list):
        return [mend(part) for part in value]
    if isinstance(value, dict):
        return {mend(key): mend(part) for key, part in value.items()}
    return value
