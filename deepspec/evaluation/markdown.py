"""Markdown that reports and model cards share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int | None = None) -> str:
    """A table; columns after the first `text_columns` are numbers, aligned right (None = all are text)."""
    texts = len(header) if text_columns is None else text_columns
    rule = ["---" if place < texts else "---:" for place in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in [header, rule, *rows]
    )
