"""The folder of answers: one file a rank, a line a row, written as rows end. Whatever kills a run, no row is lost.

    answers-rank0.jsonl, ...        the conversations; the folder can be trained on as it is
    .regenerate/settings.json       what they depend on
    .regenerate/left-out-rank0.jsonl, ...   rows that were refused or dropped, and why

Rows are known by id. A line that a crash has torn is cut away when the next run begins.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.files import write_atomically

HIDDEN = ".regenerate"
SETTINGS, LOCK = "settings.json", "lock"
FINAL = ("cut", "refused")  # reasons for which a row counts as done; others are tried again


class RowStore:
    """Lines of rows in a folder that several ranks write, and that one run at a time may write."""

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int = 0,
        kept: str = "answers",
        hidden: str = HIDDEN,
        results: Collection[str] = (),
    ):
        """
        Args:
            kept: what the files of kept rows are called, their folder inside included.
            hidden: the folder inside with all that is no data.
            results: JSONL files that are made of the rows in the end.
        """
        self.folder = Path(folder)
        self.hidden = self.folder / hidden
        self._kept, self._rank, self._results = kept, rank, frozenset(results)
        self._lock: IO[bytes] | None = None
        self._files: dict[str, IO[bytes]] = {}

    def kept_files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._kept}-rank*.jsonl"))

    def left_out_files(self) -> list[Path]:
        return sorted(self.hidden.glob("left-out-rank*.jsonl"))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Of rank 0, before any other rank joins: take the folder, compare the settings, cut away torn lines.

        Raises:
            ConfigError: another run is writing there, the rows there were made with other settings, or there are files
                that were not made by this command.
        """
        self._take_lock()
        self._check_contents()
        self._check_settings(settings)
        for file in [*self.kept_files(), *self.left_out_files()]:
            cut_torn_line(file)

    def join(self) -> None:
        """Of every rank, once rank 0 has begun: hold the folder as long as this process lives."""
        self.hidden.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = (self.hidden / LOCK).open("ab")
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def kept(self) -> Iterator[dict[str, Any]]:
        """Rows of earlier runs. Raises DataError for a line that is none."""
        for file in self.kept_files():
            yield from _rows(file)

    def left_out(self) -> Iterator[dict[str, Any]]:
        for file in self.left_out_files():
            yield from _rows(file)

    def keep(self, row: Mapping[str, Any]) -> None:
        self._append(self.folder / f"{self._kept}-rank{self._rank}.jsonl", row)

    def leave_out(self, row: Mapping[str, Any]) -> None:
        """Args: `row` has `id`, `prompt`, `reason` (cut, refused, failed) and `detail`."""
        self._append(self.hidden / f"left-out-rank{self._rank}.jsonl", row)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._lock:
            self._lock.close()
        self._files, self._lock = {}, None

    def _append(self, path: Path, row: Mapping[str, Any]) -> None:
        if path.name not in self._files:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[path.name] = path.open("ab")
        line = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        try:
            self._files[path.name].write(line)
            self._files[path.name].flush()
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error}); make room and run the same command again") from error

    def _take_lock(self) -> None:
        self.hidden.mkdir(parents=True, exist_ok=True)
        self._lock = (self.hidden / LOCK).open("ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"output_dir={self.folder}: another run is writing there; wait for it, end all of its processes, or "
                "name another folder"
            ) from error
        fcntl.flock(self._lock, fcntl.LOCK_SH)  # the other ranks join

    def _check_contents(self) -> None:
        ours = set(self.kept_files())
        found = [file for file in sorted(self.folder.glob("*.jsonl")) if file not in ours]
        others = [file.name for file in found if file.name not in self._results or not self._has_settings]
        if others:
            raise ConfigError(
                f"output_dir={self.folder}: holds {others[0]}, which this command has not written and which would be "
                "read together with its rows; name another folder"
            )
        if ours and not self._has_settings:
            raise ConfigError(
                f"output_dir={self.folder}: holds {min(ours).name} but no record of its settings "
                f"({self.hidden / SETTINGS}); copy hidden files with the folder, or name another one"
            )

    @property
    def _has_settings(self) -> bool:
        return (self.hidden / SETTINGS).is_file()

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        file = self.hidden / SETTINGS
        now = json.loads(json.dumps(settings))
        if file.is_file() and any(each.stat().st_size for each in [*self.kept_files(), *self.left_out_files()]):
            try:
                then = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{file}: damaged ({error}); name another output_dir") from error
            different = [key for key in {**then, **now} if then.get(key) != now.get(key)]
            if different:
                shown = ", ".join(f"{key}={_text(then.get(key))} (now {_text(now.get(key))})" for key in different)
                raise ConfigError(
                    f"output_dir={self.folder}: its rows were made with {shown}; give the same again to go on, or "
                    "name another folder"
                )
        else:
            write_atomically(file, json.dumps(now, indent=2))


def cut_torn_line(path: Path) -> None:
    """Cut away what stands behind the last line break."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                position = start + found + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                row["id"], row["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file}, line {number}: no row of this command ({error}); remove the line, its prompt is then "
                    "answered again"
                ) from error
            yield row


def _text(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)


def done_rows(store: RowStore) -> tuple[dict[str, str], dict[str, str]]:
    """Digests by id of all rows of earlier runs, and of those the reasons by id why some are left out for good."""
    known: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for row in store.left_out():
        if row["reason"] in FINAL:
            known[row["id"]], reasons[row["id"]] = row["prompt"], row["reason"]
    for row in store.kept():
        known[row["id"]] = row["prompt"]
    return known, reasons
