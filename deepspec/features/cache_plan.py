"""What a feature cache will hold, how large it gets and how it falls into shards, before a weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepspec.data.dataset import ConversationDataset
from deepspec.data.packing import Sample
from deepspec.features.cache_format import KEY_BYTES, document_key, stored_positions
from deepspec.features.cache_storage import Storage

TOKEN_BYTES = 4 + 1  # token id and loss mask
DOCUMENT_BYTES = KEY_BYTES + 8 + 3 * 8  # key, checksum, three offsets


@dataclass(frozen=True)
class Survey:
    """The different documents of some data sets, in the order they first occur."""

    datasets: Sequence[ConversationDataset]
    keys: np.ndarray  # uint8 [documents, KEY_BYTES]
    places: np.ndarray  # [documents, 2]: which data set, which sample
    tokens: np.ndarray  # [documents]
    context: np.ndarray  # [documents], tokens whose context is stored
    final: np.ndarray  # [documents], positions whose final state is stored
    samples: int  # repeated ones included

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, document: int) -> Sample:
        dataset, row = self.places[document]
        return self.datasets[dataset][int(row), 0]

    def bytes_per_document(self, storage: Storage, layers: int, hidden: int) -> np.ndarray:
        """[documents]"""
        features = self.context * storage.context_bytes(layers, hidden) + self.final * storage.final_bytes(hidden)
        return features + self.tokens * TOKEN_BYTES + DOCUMENT_BYTES


def survey_datasets(datasets: Sequence[ConversationDataset]) -> Survey:
    """One pass over the token ids of every sample."""
    found: dict[bytes, tuple[int, int, int, int, int]] = {}
    for number, dataset in enumerate(datasets):
        columns = dataset.rows.select_columns(["input_ids", "loss_mask"]).with_format("numpy")
        for row, sample in enumerate(columns):
            key = document_key(sample["input_ids"], sample["loss_mask"])
            if key not in found:
                context, positions = stored_positions(sample["loss_mask"])
                found[key] = (number, row, len(sample["input_ids"]), context, len(positions))
    figures = np.array(list(found.values()), dtype=np.int64)
    return Survey(
        datasets=datasets,
        keys=np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, KEY_BYTES),
        places=figures[:, :2],
        tokens=figures[:, 2],
        context=figures[:, 3],
        final=figures[:, 4],
        samples=sum(map(len, datasets)),
    )


def shard_bounds(bytes_per_document: np.ndarray, shard_bytes: int) -> np.ndarray:
    """Cut documents into shards of about `shard_bytes`, whatever the number of ranks.

    Returns:
        [shards + 1]: shard i holds the documents bounds[i] .. bounds[i + 1] - 1.
    """
    before = np.cumsum(bytes_per_document) - bytes_per_document
    first = np.flatnonzero(np.diff(before // shard_bytes, prepend=-1))
    return np.append(first, len(bytes_per_document))


def free_bytes(folder: Path) -> int:
    """Free space of the disk that `folder` is on, or will be."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free
