"""Small file helpers: digests and writes that are either whole or absent."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's content, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def match_digests(folder: Path, digests: Mapping[str, str]) -> bool:
    """Whether every named file of `folder` is there with its recorded SHA-256."""
    return all((folder / name).is_file() and sha256_of(folder / name) == digest for name, digest in digests.items())


def write_atomically(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader, or a crash, sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
