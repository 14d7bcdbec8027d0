"""JSONL reading with errors that name the file and the line."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SHOWN = 5  # files in a message
BOM = b"\xef\xbb\xbf"


class DataError(ValueError):
    """A data file that cannot be used. The message names the file and, where there is one, the line."""


class RowError(DataError):
    """A single row that cannot be used; its neighbours may be. The message names file and line, and what is wrong."""


OnBadRow = Callable[[RowError], None]


def refuse_row(error: RowError, on_bad_row: OnBadRow | None) -> None:
    """Raise the error, or hand it to whoever skips bad rows."""
    if on_bad_row is None:
        raise error
    on_bad_row(error)


def check_file(path: str | Path) -> None:
    """Refuse what is no file; of a folder or a pattern, the files that may have been meant are named.

    Raises:
        DataError: with what to give.
    """
    path = Path(path)
    if path.is_file():
        return
    if path.is_dir():
        meant, what = sorted(map(str, path.glob("*.jsonl"))), "a folder"
    else:
        meant, what = sorted(glob.glob(str(path))), "no such file; a pattern is not filled in"
    if not meant:
        raise DataError(f"{path}: a folder without JSONL files" if path.is_dir() else f"{path}: no such file")
    shown = ",".join(meant[:SHOWN]) + (",..." if len(meant) > SHOWN else "")
    raise DataError(f"{path}: {what}; name its files one by one, in the order to read them: [{shown}]")


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each non-blank line, `place` being "FILE, line N" for use in messages.

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    check_file(path)
    rows = 0
    with path.open("rb") as file:
        for place, row in parse_lines(file, str(path)):
            rows += 1
            yield place, row
    if rows == 0:
        raise DataError(f"{path}: the file is empty")


def parse_lines(
    lines: Iterable[bytes], name: str, on_bad_row: OnBadRow | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each non-blank line of a file called `name`; a byte order mark may come first.

    Raises:
        RowError: a line is not UTF-8 or not a JSON object, and there is no `on_bad_row` to tell.
    """
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            raw = raw.removeprefix(BOM)
        if not raw.strip():
            continue
        place = f"{name}, line {number}"
        try:
            # Decoded here: left alone, json guesses UTF-16 for a line with zero bytes.
            row = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            refuse_row(RowError(f"{place}: not UTF-8 ({error}); convert the file"), on_bad_row)
        except (ValueError, RecursionError) as error:
            expected = "; expected one JSON object a line, or a single array of objects" if number == 1 else ""
            reason = f"malformed JSON ({error}); mend or remove the line{expected}"
            refuse_row(RowError(f"{place}: {reason}"), on_bad_row)
        else:
            if isinstance(row, dict):
                yield place, row
            else:
                found = type(row).__name__
                refuse_row(RowError(f"{place}: expected a JSON object, found {found}"), on_bad_row)
