"""Feature caches of the tiny world, written as `python -m data_prep.cache` writes them, also by processes that die."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from training_world import changed, die_at_call, tiny_run

from deepspec.config import CacheRun, TrainRun

SHARD_MIB = 0.05  # about 6 shards


def cached_run(world: Path, cache: Path, output_dir: Path | str = "unused", **train: Any) -> TrainRun:
    """A training run that reads the cache in `cache`; `train` as for `tiny_run`."""
    features = {"source": "cached", "cache_dir": str(cache), "cache_shard_mib": SHARD_MIB, "cache_dtype": "float32"}
    return changed(tiny_run(world, output_dir, **train), features=features)


def as_cache_run(run: TrainRun, force: bool = False) -> CacheRun:
    return CacheRun(**vars(run), force=force)


def write_cache(run: TrainRun) -> Path:
    """The cache that `run` reads."""
    from data_prep.cache import write

    write(as_cache_run(run))
    return Path(run.features.cache_dir)


def write_in_child(run: TrainRun, folder: str, rank: int = 0, ranks: int = 1, die_at: tuple[str, int] | None = None):
    """Write as one rank of several in a process that may die, see `training_world.die_at_call`."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    if die_at is not None:
        die_at_call(*die_at)
    write_cache(run)


def contents(cache: Path) -> dict[str, bytes]:
    """Every file of a cache by name, hidden ones included."""
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
