"""Words for messages."""

from __future__ import annotations


def some(items: list[str], shown: int = 5) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
