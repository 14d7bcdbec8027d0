"""Keys that Arrow adds: a column of structs has every key in every row, null where the row had none."""

from __future__ import annotations

from typing import Any

MEANT_NULLS = {"content", "value"}  # an assistant message that only calls tools has a content of null


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its columns as they are, and nothing null within them except the content of messages."""
    return {name: _without(value) if isinstance(value, dict | list) else value for name, value in row.items()}


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        kept = MEANT_NULLS if "role" in value or "from" in value else ()
        return {name: _without(part) for name, part in value.items() if part is not None or name in kept}
    if isinstance(value, list):
        return [_without(part) for part in value]
    return value
