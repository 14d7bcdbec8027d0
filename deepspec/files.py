"""Small file helpers: digests, the files of a model, and writes that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from deepspec.config import ConfigError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def match_digests(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether every named file of `folder` is there with its recorded SHA-256."""
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in digests.items())


def weight_files(folder: Path, single: str = SINGLE_FILE) -> list[Path]:
    """The files of a model saved in one file, named `single`, or in several with an index.

    Raises:
        FileNotFoundError: one of them is missing.
        ConfigError: the index is damaged.
    """
    names, index = [single], folder / f"{single}.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index}: not a readable index of weight files: {error}") from error
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing weight file; copy or download it again")
    return [folder / name for name in names]


def download_model(
    repo: str, revision: str | None, key: str, files: Sequence[str] = ("*.json", "model*.safetensors")
) -> Path:
    """The folder of a Hub repository's configs and weights in the local cache, fetched where they are not there.

    Args:
        key: of the configuration that names the repository, for the message.
        files: patterns of the names that are fetched.

    Raises:
        FileNotFoundError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{key}={repo}: no such folder, and it could not be fetched from the Hub"
            f"{f' at revision {revision}' if revision else ''}: {error}"
        ) from error


def flush_folder(folder: Path) -> None:
    """Make renames inside a folder last through a power failure."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int], int]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with; for writers that must not hold or copy all tensors as the library does.

    Args:
        tensors: dtype code, shape and bytes of every tensor, in the order in which they follow.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        start, end = end, end + size
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def unfinished_name(path: Path) -> Path:
    """A hidden name beside `path` to write under before renaming; no two writers get the same."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def remove_unfinished(path: Path, *, older_than: float = 0.0) -> None:
    """Delete what killed writers of `path` left behind. Where others may be writing it, say with `older_than` how many
    seconds ago nobody who still lives can have begun."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(FileNotFoundError):  # another process was faster
            if time.time() - leftover.stat().st_mtime >= older_than:
                leftover.unlink()


def write_atomically(path: str | Path, text: str, *, shared: bool = False) -> None:
    """Write UTF-8 text so that a reader, or a crash, sees the old file or the new one, never a part.

    Args:
        shared: other processes may write the same file now; else what killed ones left behind is removed.
    """
    with open_atomically(path, shared=shared) as file:
        file.write(text)


@contextmanager
def open_atomically(path: str | Path, *, shared: bool = False) -> Iterator[IO[str]]:
    """A UTF-8 file to write; it takes its name, and the place of an old one, when the block ends without an error.

    Args:
        shared: see `write_atomically`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not shared:
        remove_unfinished(path)
    unfinished = unfinished_name(path)
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
