"""Write a feature cache: shard by shard, each whole or absent, on any number of ranks, again after any interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deepspec.data.packing import Sample, anchor_candidates, lay_out
from deepspec.features.cache_format import (
    DOCUMENTS,
    MANIFEST,
    SETTINGS,
    CacheError,
    CacheSettings,
    Manifest,
    ShardRecord,
    checksum,
    read_record,
    read_settings,
    record_file,
    shard_file,
    stored_features,
    stored_positions,
)
from deepspec.features.cache_plan import Survey, free_bytes
from deepspec.features.cache_storage import STORAGES, Storage, compress
from deepspec.files import flush_folder, remove_unfinished, sha256_of, unfinished_name, write_atomically
from deepspec.targets import Target

DAY = 86_400.0  # seconds; far longer than the files that describe a cache take to write


@dataclass(frozen=True)
class CachePlan:
    """What is to be written, and where."""

    folder: Path
    settings: CacheSettings
    survey: Survey
    bounds: np.ndarray  # [shards + 1], see `shard_bounds`

    def missing_shards(self) -> list[int]:
        """Numbers of the shards that are not complete."""
        return [number for number in range(self.settings.shards) if not self._is_complete(number)]

    def _is_complete(self, number: int) -> bool:
        record = read_record(self.folder, number)
        return record is not None and record.settings == self.settings.digest and record.is_size_right(self.folder)


def check_folder(plan: CachePlan) -> None:
    """Refuse a folder that holds another cache.

    Raises:
        CacheError: with what differs.
    """
    try:
        written = read_settings(plan.folder)
    except FileNotFoundError:
        return
    theirs, ours = written.identity(), plan.settings.identity()
    changed = [f"{key} is {ours[key]}, but was {theirs[key]}" for key in ours if theirs[key] != ours[key]]
    if changed:
        rendering = plan.settings.rendering.differences(written.rendering)
        differences = "\n  ".join(rendering + [line for line in changed if not line.startswith("rendering")])
        raise CacheError(
            f"features.cache_dir={plan.folder} holds another cache:\n  {differences}\nGive another features.cache_dir, "
            "delete that folder, or give the old values to finish it"
        )


def begin(plan: CachePlan) -> None:
    """Write what the cache is of, where that is not there yet. Every rank calls this, after `check_folder`."""
    for name in (SETTINGS, DOCUMENTS, MANIFEST):
        remove_unfinished(plan.folder / name, older_than=DAY)
    if not (plan.folder / SETTINGS).is_file():
        _write_json(plan.folder / SETTINGS, asdict(plan.settings))
    documents = plan.folder / DOCUMENTS
    if not documents.is_file() or sha256_of(documents) != plan.settings.documents_sha256:
        _save(documents, documents_tensors(plan.survey, plan.bounds))


def documents_tensors(survey: Survey, bounds: np.ndarray) -> dict[str, Tensor]:
    """Content of documents.safetensors."""
    return {"keys": torch.from_numpy(survey.keys.copy()), "shard_bounds": torch.from_numpy(bounds)}


def write_shards(
    plan: CachePlan,
    numbers: Iterable[int],
    target: Target,
    *,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Compute and write some shards; one is written to disk while the next is computed.

    Args:
        numbers: of the shards, which no other process writes.
        batch_tokens: documents are packed into rows of at most so many tokens for one pass of the target.
        advance: told of tokens computed.

    Raises:
        CacheError: the target gives numbers that are not finite, or a file cannot be written. What is complete stays.
    """
    with ThreadPoolExecutor(1, "shards") as pool:
        stored: Future[None] | None = None
        for number in numbers:
            tensors = _compute(plan, number, target, batch_tokens, advance)
            if stored is not None:
                stored.result()
            stored = pool.submit(_store, plan, number, tensors)
        if stored is not None:
            stored.result()


def finish(plan: CachePlan) -> Manifest | None:
    """Write the manifest if every shard is complete; the rank that completes the last one does.

    Returns:
        None while shards are missing.
    """
    if plan.missing_shards():
        return None
    records = [read_record(plan.folder, number) for number in range(plan.settings.shards)]
    manifest = Manifest(plan.settings, [record for record in records if record is not None])
    _write_json(plan.folder / MANIFEST, manifest.to_json())
    return manifest


def _compute(
    plan: CachePlan, number: int, target: Target, batch_tokens: int, advance: Callable[[int], None]
) -> dict[str, Tensor]:
    """The tensors of one shard."""
    documents = range(int(plan.bounds[number]), int(plan.bounds[number + 1]))
    samples = [plan.survey.sample(document) for document in documents]
    layer_ids, storage = plan.settings.layer_ids, STORAGES[plan.settings.dtype]
    parts = []
    for batch in _packed(samples, batch_tokens):
        parts.append(_features(batch, target, layer_ids, storage))
        advance(sum(len(sample.input_ids) for sample in batch))
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    survey = plan.survey
    tensors |= {
        "keys": torch.from_numpy(survey.keys[documents.start : documents.stop].copy()),
        "token_ids": torch.cat([torch.tensor(sample.input_ids, dtype=torch.int32) for sample in samples]),
        "loss_mask": torch.cat([torch.tensor(sample.loss_mask, dtype=torch.uint8) for sample in samples]),
        "token_offsets": _offsets(survey.tokens[documents.start : documents.stop]),
        "context_offsets": _offsets(survey.context[documents.start : documents.stop]),
        "final_offsets": _offsets(survey.final[documents.start : documents.stop]),
    }
    checksums = [checksum(stored_features(tensors, place).values()) for place in range(len(samples))]
    return tensors | {"checksums": torch.tensor(checksums)}


def _packed(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[Sample]]:
    """Consecutive samples of at most `batch_tokens` together; a longer one alone."""
    batch: list[Sample] = []
    tokens = 0
    for sample in samples:
        if batch and tokens + len(sample.input_ids) > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(sample)
        tokens += len(sample.input_ids)
    yield batch


def _features(
    samples: Sequence[Sample], target: Target, layer_ids: Sequence[int], storage: Storage
) -> dict[str, Tensor]:
    """Stored features of documents in one row, on the CPU."""
    batch = lay_out([samples], pad_id=0)
    features = target.features(batch.to(target.device), layer_ids)
    spans = [
        (document.start, document.start + stored_positions(np.asarray(sample.loss_mask))[0])
        for document, sample in zip(batch.documents, samples, strict=True)
    ]
    columns = torch.cat([torch.arange(*span) for span in spans]).to(target.device)
    context = features.context[0, columns]
    final = features.final[0, anchor_candidates(batch.loss_mask, batch.position_ids)[0].to(target.device)]
    if not (context.isfinite().all() and final.isfinite().all()):
        raise CacheError(
            f"the target's features of the samples {', '.join(sample.id for sample in samples)} are not all finite: "
            f"look at them, or compute in another target.dtype than {target.dtype}"
        )
    values, scales = compress(context, len(layer_ids), storage)
    tensors = {"context": values.cpu(), "final": final.to(storage.final).cpu()}
    return tensors if scales is None else tensors | {"context_scales": scales.cpu()}


def _offsets(lengths: np.ndarray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))


def _store(plan: CachePlan, number: int, tensors: dict[str, Tensor]) -> None:
    file = shard_file(plan.folder, number)
    remove_unfinished(file)
    remove_unfinished(record_file(plan.folder, number))
    size, sha256 = _save(file, tensors)
    first, end = int(plan.bounds[number]), int(plan.bounds[number + 1])
    record = ShardRecord(
        file=file.relative_to(plan.folder).as_posix(),
        first=first,
        end=end,
        tokens=int(plan.survey.tokens[first:end].sum()),
        bytes=size,
        sha256=sha256,
        settings=plan.settings.digest,
    )
    _write_json(record_file(plan.folder, number), asdict(record))


def _save(file: Path, tensors: dict[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file, whole or not at all. Returns its size and SHA-256."""
    unfinished = unfinished_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished)
        with unfinished.open("rb") as opened:
            os.fsync(opened.fileno())
        written = unfinished.stat().st_size, sha256_of(unfinished)
        os.replace(unfinished, file)
        flush_folder(file.parent)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise _write_error(file, error) from error
    return written


def _write_json(file: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(file, json.dumps(content, indent=1), shared=True)
    except OSError as error:
        raise _write_error(file, error) from error


def _write_error(file: Path, error: Exception) -> CacheError:
    return CacheError(
        f"could not write {file}: {error}. {free_bytes(file) / 2**20:,.0f} MiB are free there. Complete shards are "
        "kept: free some space or make the folder writable, then give the same command again"
    )
