"""Read features from a cache: memory-mapped shards, checked before the first step and again at every first use."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepspec.data.dataset import ConversationDataset
from deepspec.data.packing import Document, TokenBatch
from deepspec.features.cache_format import (
    DOCUMENTS,
    KEY_BYTES,
    MANIFEST,
    CachedRendering,
    CacheError,
    Manifest,
    checksum,
    document_key,
    read_manifest,
    repair_command,
    stored_features,
    stored_positions,
)
from deepspec.features.cache_storage import restore
from deepspec.files import sha256_of
from deepspec.targets import TargetFeatures

OPEN_SHARDS = 256  # kept mapped
PROBES = 64  # samples of a data set that are looked up before training


class CachedFeatures:
    """Features that `data_prep.cache` wrote. The target itself is not needed."""

    flops_per_token = 0.0
    concurrency = 1
    is_remote = False

    def __init__(
        self,
        folder: Path | str,
        *,
        target_fingerprint: str,
        target_dtype: str,
        layer_ids: Sequence[int],
        rendering: CachedRendering,
        device: torch.device,
    ):
        """
        Args:
            folder: of the cache.
            target_fingerprint: of the target that the draft is trained for.
            target_dtype: its target.dtype; features are given in it.
            layer_ids: captured layers that the draft reads.
            rendering: how this run makes token ids, to explain documents that are not in the cache.
            device: where features are wanted.

        Raises:
            CacheError: no complete cache, one of another target or other layers, or files missing or cut.
        """
        self.folder = Path(folder)
        self.device = device
        self.manifest = read_manifest(self.folder)
        self.rendering = rendering
        self._check_settings(target_fingerprint, target_dtype, layer_ids)
        self._check_files()
        keys = _read_keys(self.folder, self.manifest)
        self._order = np.argsort(keys)
        self._sorted_keys = keys[self._order]
        self._ends = np.array([shard.end for shard in self.manifest.shards])
        self._is_verified = np.zeros(len(keys), dtype=bool)
        self._shard = lru_cache(OPEN_SHARDS)(self._open_shard)
        self._dtype = getattr(torch, self.manifest.settings.target_dtype)

    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        """See `FeatureSource`. Zero where nothing is stored.

        Raises:
            CacheError: a document that is not in the cache, or that differs from what was written.
        """
        length = batch.input_ids.shape[1]
        parts: dict[str, list[Tensor]] = {}
        context_places, final_places = [], []
        for document in batch.documents:
            ids = batch.input_ids[document.row, document.columns].numpy()
            mask = batch.loss_mask[document.row, document.columns].numpy()
            for name, tensor in self._read(self._find(ids, mask, document)).items():
                parts.setdefault(name, []).append(tensor)
            context_length, positions = stored_positions(mask)
            first = document.row * length + document.start
            context_places.append(torch.arange(first, first + context_length))
            final_places.append(torch.from_numpy(first + positions))
        values = {name: torch.cat(tensors).to(self.device) for name, tensors in parts.items()}
        context = restore(values["context"], values.get("context_scales"), self._dtype)
        final = values["final"].to(self._dtype)
        shape = batch.input_ids.shape
        return TargetFeatures(_spread(context, context_places, shape), _spread(final, final_places, shape))

    def check_documents(self, dataset: ConversationDataset) -> None:
        """Look up some samples of a data set, so that one of another rendering is refused before the first step.

        Raises:
            CacheError: one is not in the cache.
        """
        for index in np.unique(np.linspace(0, len(dataset) - 1, PROBES).astype(int)).tolist():
            sample = dataset[index, 0]
            ids, mask = np.asarray(sample.input_ids), np.asarray(sample.loss_mask)
            self._find(ids, mask, Document(index, 0, 0, len(ids)))

    def close(self) -> None:
        """Unmap the shards."""
        self._shard.cache_clear()

    def _check_settings(self, fingerprint: str, dtype: str, layer_ids: Sequence[int]) -> None:
        settings = self.manifest.settings
        another = f"give that cache's {{}}, or write a cache for this run in another folder: {_write_command()}"
        if settings.target_fingerprint != fingerprint:
            raise CacheError(
                f"features.cache_dir={self.folder}: a cache of target {settings.target} with fingerprint "
                f"{settings.target_fingerprint[:12]}, but the fingerprint of this run's target is {fingerprint[:12]}; "
                + another.format("target.path")
            )
        if settings.layer_ids != list(layer_ids):
            raise CacheError(
                f"features.cache_dir={self.folder}: a cache of the target layers {settings.layer_ids}, but this draft "
                f"reads {list(layer_ids)}; " + another.format("draft.target_layer_ids")
            )
        if settings.target_dtype != dtype:
            raise CacheError(
                f"features.cache_dir={self.folder}: the target computed in {settings.target_dtype}, but this run says "
                f"target.dtype={dtype}; " + another.format("target.dtype")
            )

    def _check_files(self) -> None:
        damaged = [shard.file for shard in self.manifest.shards if not shard.is_size_right(self.folder)]
        if damaged:
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            raise CacheError(
                f"{self.folder}: missing or cut short: {', '.join(damaged[:5])}{more}; {repair_command(self.folder)}"
            )

    def _find(self, ids: np.ndarray, mask: np.ndarray, document: Document) -> int:
        """Number of a document in the cache."""
        key = np.void(document_key(ids, mask))
        place = int(np.searchsorted(self._sorted_keys, key))
        if place == len(self._sorted_keys) or self._sorted_keys[place] != key:
            raise CacheError(self._explain_absence(document))
        return int(self._order[place])

    def _explain_absence(self, document: Document) -> str:
        settings = self.manifest.settings
        causes = self.rendering.differences(settings.rendering)
        reason = (
            "; ".join(causes)
            if causes
            else (
                "the rendering is the same, so the data files are others than those of the cache, which are "
                + ", ".join(settings.data_files)
            )
        )
        return (
            f"features.cache_dir={self.folder}: sample {document.index} ({document.length} tokens) is not in the "
            f"cache: {reason}. Give the keys that the cache was written with, or write one for this run in another "
            f"folder: {_write_command()}"
        )

    def _read(self, number: int) -> dict[str, Tensor]:
        """Stored features of a document, on the CPU; compared with their checksum the first time."""
        shard_number = int(np.searchsorted(self._ends, number, side="right"))
        record = self.manifest.shards[shard_number]
        place = number - record.first
        try:
            shard = self._shard(shard_number)
            features = stored_features(shard, place)
            is_intact = self._is_verified[number] or checksum(features.values()) == int(shard["checksums"][place])
        except (OSError, SafetensorError, IndexError) as error:
            raise CacheError(
                f"{self.folder / record.file}: cannot be read ({error}); {repair_command(self.folder)}"
            ) from error
        if not is_intact:
            raise CacheError(
                f"{self.folder / record.file}: document {place} of the shard differs from what was written (CRC-32); "
                + repair_command(self.folder)
            )
        self._is_verified[number] = True
        return features

    def _open_shard(self, number: int) -> dict[str, Any]:
        """Small tensors in memory, features as slices of the mapped file."""
        shard: dict[str, Any] = {}
        mapped = safe_open(self.folder / self.manifest.shards[number].file, framework="pt")
        for name in mapped.keys():  # noqa: SIM118
            if name in ("context", "context_scales", "final"):
                shard[name] = mapped.get_slice(name)
            elif name in ("context_offsets", "final_offsets", "checksums"):
                shard[name] = mapped.get_tensor(name).numpy()
        return shard


def _read_keys(folder: Path, manifest: Manifest) -> np.ndarray:
    """Keys of all documents in order, as 16-byte strings."""
    file = folder / DOCUMENTS
    if not file.is_file() or sha256_of(file) != manifest.settings.documents_sha256:
        raise CacheError(f"{file}: missing, or its content differs from {MANIFEST}; {repair_command(folder)}")
    with safe_open(file, framework="pt") as tensors:
        keys = tensors.get_tensor("keys").numpy()
    return np.ascontiguousarray(keys).view(f"V{KEY_BYTES}")[:, 0]


def _spread(rows: Tensor, places: list[Tensor], shape: torch.Size) -> Tensor:
    """[N, width] at their places in a batch -> [rows, tokens, width], zero elsewhere"""
    spread = rows.new_zeros(shape.numel(), rows.shape[1])
    spread[torch.cat(places).to(rows.device)] = rows
    return spread.view(*shape, rows.shape[1])


def _write_command() -> str:
    return "python -m data_prep.cache features.cache_dir=... and the keys of the training run"
