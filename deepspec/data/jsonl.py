"""JSONL reading with errors that name the file and the line."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHOWN = 5  # files in a message


class DataError(ValueError):
    """A data file that cannot be used. The message names the file and, where there is one, the line."""


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
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(raw)
            except UnicodeDecodeError as error:
                raise DataError(f"{place}: not UTF-8 ({error})") from error
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: malformed JSON ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise DataError(f"{place}: expected a JSON object, found {type(row).__name__}")
            rows += 1
            yield place, row
    if rows == 0:
        raise DataError(f"{path}: the file is empty")
