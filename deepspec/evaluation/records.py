"""Decoded chunks of prompts on disk, so that an interrupted evaluation goes on where it was.

While it runs, each rank appends its finished chunks to `rounds-rankR.jsonl`; when all are there, rank 0 writes them
to `rounds.jsonl` and the parts are removed. A record counts only if it was made under the same settings on the same
prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from deepspec.decoding import Completion, Round
from deepspec.decoding.recorded_rounds import ROUNDS_FILE
from deepspec.files import write_atomically

Key: TypeAlias = tuple[str, float, int, str]


@dataclass(frozen=True)
class Decoding:
    """One way of decoding a chunk."""

    seconds: float  # wall time of the whole chunk
    completions: list[Completion]  # prompt after prompt, of each its turns

    @property
    def tokens(self) -> int:
        return sum(len(completion.output_ids) for completion in self.completions)


@dataclass(frozen=True)
class Record:
    """One chunk: consecutive prompts of a set, decoded together at one temperature."""

    set_name: str
    temperature: float
    start: int  # index of the first prompt
    prompts: str  # digest of the rendered prompts
    speculative: Decoding
    plain: Decoding | None  # without the draft; None when no baseline was asked for
    turns: list[int] = field(
        default_factory=list
    )  # how many were decoded of each prompt; [] = one, as earlier versions

    def by_prompt(self) -> list[list[Completion]]:
        """What was decoded with the draft: of each prompt, its turns."""
        remaining = iter(self.speculative.completions)
        return [list(islice(remaining, turns)) for turns in self.turns or [1] * len(self.speculative.completions)]

    @property
    def key(self) -> Key:
        return (self.set_name, self.temperature, self.start, self.prompts)


def digest_of(value: Any) -> str:
    """A short digest of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def to_line(record: Record, settings_digest: str) -> str:
    return json.dumps({"settings": settings_digest, **asdict(record)}) + "\n"


def _decoding(value: dict[str, Any] | None) -> Decoding | None:
    if value is None:
        return None
    completions = [
        Completion(c["output_ids"], [Round(**r) for r in c["rounds"]], c["finish_reason"]) for c in value["completions"]
    ]
    return Decoding(value["seconds"], completions)


class RecordStore:
    """The records of one output folder, as seen by one rank."""

    def __init__(self, output_dir: str | Path, settings_digest: str, rank: int = 0):
        self.folder = Path(output_dir)
        self.settings_digest = settings_digest
        self.part = self.folder / f"rounds-rank{rank}.jsonl"

    def files(self) -> list[Path]:
        return [
            file
            for file in (self.folder / ROUNDS_FILE, *sorted(self.folder.glob("rounds-rank*.jsonl")))
            if file.is_file()
        ]

    def read(self) -> tuple[dict[Key, Record], int]:
        """The usable records and the number of those made under other settings. A torn line is passed over."""
        records: dict[Key, Record] = {}
        outdated = 0
        for file in self.files():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    if row.pop("settings") != self.settings_digest:
                        outdated += 1
                        continue
                    speculative, plain = _decoding(row.pop("speculative")), _decoding(row.pop("plain"))
                    assert speculative is not None
                    record = Record(**row, speculative=speculative, plain=plain)
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                    continue
                records[record.key] = record
        return records, outdated

    def append(self, record: Record) -> None:
        """Add a finished chunk. Begins on a fresh line, so a line torn by a crash spoils only itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.part.open("a+b") as file:
            if file.tell() and not self._ends_a_line(file):
                file.write(b"\n")
            file.write(to_line(record, self.settings_digest).encode())

    @staticmethod
    def _ends_a_line(file: Any) -> bool:
        file.seek(-1, 2)
        return file.read(1) == b"\n"

    def consolidate(self, records: Iterable[Record]) -> None:
        """Make `records` the whole content of `rounds.jsonl` and remove the parts."""
        ordered = sorted(records, key=lambda record: record.key)
        write_atomically(
            self.folder / ROUNDS_FILE, "".join(to_line(record, self.settings_digest) for record in ordered)
        )
        for part in self.folder.glob("rounds-rank*.jsonl"):
            part.unlink(missing_ok=True)
