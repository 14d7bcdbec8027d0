"""Where rows come from: JSONL, JSON arrays and Parquet, also compressed, as files, folders, patterns or Hub datasets.

Everything is read as a stream: memory does not grow with the size of a source.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from deepspec.config import near_match
from deepspec.data.hub import is_saved_dataset, parse_hub_source, read_hub_rows, read_saved_rows, saved_files
from deepspec.data.json_array import read_array
from deepspec.data.jsonl import BOM, DataError, OnBadRow, RowError, parse_lines, refuse_row
from deepspec.data.nulls import without_nulls
from deepspec.files import sha256_of
from deepspec.text import some

Row = tuple[str, dict[str, Any]]  # where it is, for messages, and what it holds
JSON_SUFFIXES, COMPRESSED = (".jsonl", ".ndjson", ".json"), ("", ".gz", ".zst")
DATA_SUFFIXES = (*(name + packed for name in JSON_SUFFIXES for packed in COMPRESSED), ".parquet")
# What stands beside data without being data: descriptions by `datasets`, and what our own commands write.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "state.json", "manifest.json", "removed.jsonl"}
OTHER_FORMATS = {".csv", ".tsv", ".txt", ".xlsx", ".arrow", ".zip", ".tar", ".bz2", ".xz"}
GZIP, ZSTD, PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
BUFFER = 2**20  # bytes
PARQUET_BATCH = 256  # rows


def read_rows(source: str, *, on_bad_row: OnBadRow | None = None) -> Iterator[Row]:
    """Yield (place, row) of a source as it stands there, `place` being "FILE, line N" or "FILE, row N".

    A source is a JSONL file, a file with a JSON array of objects (either also as .gz or .zst), a Parquet file, a folder
    of such files (searched in depth, in sorted order, hidden ones left out), a pattern (`data/*.jsonl`), a folder by
    `datasets.save_to_disk`, or `hub:OWNER/NAME[/CONFIG][@REVISION][:SPLIT]`.

    Args:
        on_bad_row: told of every row that cannot be read, which is then skipped; None = the first is raised.

    Raises:
        DataError: there is no such source, it holds no rows or cannot be read.
        RowError: one row cannot be read.
    """
    rows = skipped = 0

    def skip(error: RowError) -> None:
        nonlocal skipped
        skipped += 1
        refuse_row(error, on_bad_row)

    for row in _rows(source, skip):
        rows += 1
        yield row
    if rows == skipped == 0:
        kind = "the file is empty" if Path(source).is_file() else "holds no rows"
        raise DataError(f"{source}: {kind}")


def source_digest(source: str) -> str:
    """SHA-256 of a source's content: it follows the bytes of the files and their order, not their names.

    Of a Hub dataset it follows the repository's commit, the configuration and the split.

    Raises:
        DataError: there is no such source.
    """
    if hub := parse_hub_source(source):
        return hub.digest()
    files = saved_files(Path(source)) if is_saved_dataset(Path(source)) else data_files(source)
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def data_files(source: str) -> list[Path]:
    """The files that a file name, a folder or a pattern stands for, in the order in which they are read.

    Raises:
        DataError: there are none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _files_of_folder(path)
    if glob.has_magic(source):
        found = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
        files = [file for file in found if file.is_file()]
        if not found:
            raise DataError(f"{source}: no file matches this pattern")
        return files or [file for folder in found for file in _files_of_folder(folder)]
    beside = sorted(file.name for file in path.parent.glob("*") if file.name.endswith(DATA_SUFFIXES))
    hint = f"; there are {some(beside)}.{near_match(path.name, beside)}" if beside else ""
    if not beside and len(path.parts) == 2 and not path.suffix and not path.parent.exists():
        hint = f"; a dataset of the Hub is given as hub:{source}"
    raise DataError(f"{source}: no such file{hint}")


def _files_of_folder(folder: Path) -> list[Path]:
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.name.endswith(DATA_SUFFIXES))
    chosen = [name for name in names if name.name not in NOT_DATA and not any(p.startswith(".") for p in name.parts)]
    files = [folder / name for name in chosen if (folder / name).is_file()]
    if not files:
        raise DataError(f"{folder}: a folder without data files; read are {', '.join(JSON_SUFFIXES)} and .parquet")
    if {"train.jsonl", "heldout.jsonl"} <= {file.name for file in files if file.parent == folder}:
        raise DataError(
            f"{folder}: holds a split made for training and measuring apart; name the part that you mean: "
            f"{folder / 'train.jsonl'} or {folder / 'heldout.jsonl'}"
        )
    return files


def _rows(source: str, on_bad_row: OnBadRow) -> Iterator[Row]:
    if hub := parse_hub_source(source):
        yield from read_hub_rows(hub)
    elif is_saved_dataset(Path(source)):
        yield from read_saved_rows(Path(source))
    else:
        for file in data_files(source):
            yield from _rows_of_file(file, on_bad_row)


def _rows_of_file(path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    if path.suffix.lower() in OTHER_FORMATS:
        raise DataError(
            f"{path}: {path.suffix} files are not read; convert it to JSONL or Parquet, for example with "
            'datasets.load_dataset("csv", data_files=...).to_json("data.jsonl")'
        )
    with path.open("rb") as file:
        first = file.read(4)
    if first == PARQUET:
        yield from _parquet_rows(path)
        return
    with _opened(path, first) as stream:
        start = stream.peek(4096).removeprefix(BOM).lstrip()
        if start[:1] == b"[":
            yield from _array_rows(stream, path, on_bad_row)
        else:
            yield from parse_lines(stream, str(path), on_bad_row)


@contextmanager
def _opened(path: Path, first: bytes) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked. What is wrong with the packing becomes a DataError."""
    stream: Any
    if first.startswith(GZIP):
        stream = gzip.GzipFile(path)
    elif first == ZSTD:
        stream = pa.input_stream(str(path), compression="zstd")
    else:
        stream = path.open("rb", buffering=0)
    try:
        with stream, io.BufferedReader(stream, BUFFER) as buffered:
            yield buffered
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: damaged or cut off ({error}); copy it again") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", without_nulls(row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged after row {number} ({error}); copy it again") from error


def _array_rows(stream: IO[bytes], path: Path, on_bad_row: OnBadRow) -> Iterator[Row]:
    try:
        for number, line, value in read_array(io.TextIOWrapper(stream, encoding="utf-8-sig"), str(path)):
            place = f"{path}, row {number} (line {line})"
            if isinstance(value, dict):
                yield place, value
            else:
                on_bad_row(RowError(f"{place}: expected a JSON object, found {type(value).__name__}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error}); convert the file") from error
