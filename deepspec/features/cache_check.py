"""Compare a feature cache with what was written, and clear away what differs so that it is written again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from deepspec.features.cache_format import (
    DOCUMENTS,
    MANIFEST,
    SETTINGS,
    CacheError,
    read_manifest,
    read_record,
    read_settings,
    record_file,
    shard_file,
)
from deepspec.files import sha256_of


def damaged_shards(
    folder: Path, numbers: Iterable[int], advance: Callable[[int], None] = lambda shards: None
) -> dict[int, str]:
    """Which shards are not as they were written, and in what; reads every byte.

    Args:
        folder: of the cache.
        numbers: of the shards to look at.
        advance: told of shards compared.
    """
    damaged = {}
    for number in numbers:
        file, record = shard_file(folder, number), read_record(folder, number)
        if record is None:
            damaged[number] = "not finished: it has no completion record"
        elif not file.is_file():
            damaged[number] = "missing"
        elif file.stat().st_size != record.bytes:
            damaged[number] = f"has {file.stat().st_size} bytes, but {record.bytes} were written"
        elif sha256_of(file) != record.sha256:
            damaged[number] = "its content differs from what was written (SHA-256)"
        advance(1)
    return damaged


def damaged_descriptions(folder: Path) -> dict[str, str]:
    """Which of the files that describe the cache are not as they were written, and in what.

    Raises:
        CacheError: settings.json itself is missing or damaged: nothing can be compared with it.
    """
    try:
        settings = read_settings(folder)
    except FileNotFoundError as error:
        raise CacheError(f"features.cache_dir={folder}: no {SETTINGS}, so this is not a feature cache") from error
    damaged = {}
    if not (folder / DOCUMENTS).is_file() or sha256_of(folder / DOCUMENTS) != settings.documents_sha256:
        damaged[DOCUMENTS] = "missing, or its content differs from what was written (SHA-256)"
    try:
        manifest = read_manifest(folder)
        records = [read_record(folder, number) for number in range(settings.shards)]
        if manifest.settings.identity() != settings.identity() or manifest.shards != records:
            damaged[MANIFEST] = f"does not agree with {SETTINGS} and the completion records"
    except CacheError as error:
        damaged[MANIFEST] = str(error)
    return damaged


def discard(folder: Path, numbers: Iterable[int]) -> None:
    """Delete shards with their records, and the manifest that lists them."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for number in numbers:
        record_file(folder, number).unlink(missing_ok=True)
        shard_file(folder, number).unlink(missing_ok=True)
