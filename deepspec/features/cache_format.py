"""What a feature cache is on disk.

    CACHE/settings.json            what it is a cache of, written first
    CACHE/documents.safetensors    the key of every document, in order, and where each shard begins
    CACHE/shards/000000.safetensors
    CACHE/records/000000.json      size and SHA-256 of a shard, written when it is complete
    CACHE/manifest.json            the settings and all records, written last

A shard holds the tensors of whole documents, one behind the other: context features of the tokens that a block can see,
final states where they can carry loss, token ids, loss mask, and a CRC-32 per document. A document is found by the
digest of its token ids and loss mask, so one cache serves any data set, order, batch shape and number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deepspec.config import DataConfig
from deepspec.data.jsonl import DataError
from deepspec.data.packing import anchor_candidates
from deepspec.data.rendering import Rendering

SCHEMA_VERSION = 1
KEY_BYTES = 16
# What reading a damaged JSON file raises.
DAMAGE = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError)
SETTINGS, DOCUMENTS, MANIFEST = "settings.json", "documents.safetensors", "manifest.json"


class CacheError(DataError):
    """A feature cache that cannot be written or read. The message names the file and says what to do."""


def shard_file(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:06d}.safetensors"


def record_file(folder: Path, number: int) -> Path:
    return folder / "records" / f"{number:06d}.json"


def repair_command(folder: Path) -> str:
    return f"python -m data_prep.cache repair features.cache_dir={folder} (and the keys it was written with)"


def document_key(input_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """Digest of a document's token ids and loss mask, both [tokens]."""
    content = input_ids.astype(np.int32).tobytes() + loss_mask.astype(np.uint8).tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def stored_positions(loss_mask: np.ndarray) -> tuple[int, np.ndarray]:
    """Which features of a document are stored.

    Returns:
        The number of leading tokens with context: those before the last place where a block may start, since a block
        sees only what is before it. The positions with a final state: where a block may start, see `anchor_candidates`.
    """
    mask = torch.from_numpy(loss_mask.astype(bool))[None]
    positions = anchor_candidates(mask, torch.arange(mask.shape[1])[None])[0].nonzero().squeeze(1).numpy()
    return int(positions[-1]) if len(positions) else 0, positions


def stored_features(shard: Mapping[str, Any], place: int) -> dict[str, Tensor]:
    """Features of one document of a shard: `context`, `context_scales` where the storage has them, and `final`.

    Args:
        shard: tensors by name; those of the features may be slices of an open safetensors file.
        place: of the document in the shard.
    """
    context, final = (
        slice(int(shard[name][place]), int(shard[name][place + 1])) for name in ("context_offsets", "final_offsets")
    )
    rows = {"context": context, "context_scales": context, "final": final}
    return {name: shard[name][rows[name]] for name in rows if name in shard}


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the tensors' bytes, one behind the other."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, value)
    return value


@dataclass(frozen=True)
class CachedRendering:
    """How conversations became token ids."""

    tokenizer: str  # SHA-256
    chat_template: str  # SHA-256
    template_options: dict[str, Any]
    max_length: int
    system_prompt: str | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> CachedRendering:
        rendering = Rendering.of(tokenizer, data)
        vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
        return cls(
            vocabulary,
            rendering.template_sha256,
            rendering.template_options,
            data.max_length,
            rendering.system_prompt,
        )

    def differences(self, cached: CachedRendering) -> list[str]:
        """In words, what is otherwise in the cache."""
        found = []
        if self.max_length != cached.max_length:
            found.append(f"data.max_length={self.max_length}, but the cache was written with {cached.max_length}")
        if self.template_options != cached.template_options:
            found.append(
                f"data.template_options={self.template_options}, but the cache was written with "
                f"{cached.template_options}"
            )
        if self.system_prompt != cached.system_prompt:
            found.append(
                f"data.system_prompt={self.system_prompt}, but the cache was written with {cached.system_prompt}"
            )
        if self.chat_template != cached.chat_template:
            found.append("the chat template is another one (data.chat_template, or the tokenizer's own)")
        if self.tokenizer != cached.tokenizer:
            found.append("the tokenizer has another vocabulary")
        return found


@dataclass(frozen=True)
class CacheSettings:
    """What a cache is of: equal identities, equal content."""

    target: str  # target.path
    target_revision: str | None
    target_fingerprint: str
    target_dtype: str  # that it computed in, and that features are given in
    rendering: CachedRendering
    layer_ids: list[int]  # captured layers, in the order they lie in the context
    hidden_size: int
    dtype: str  # a name in STORAGES
    samples: int  # of the data files
    documents: int  # that differ
    tokens: int  # of the documents
    shards: int
    documents_sha256: str  # of documents.safetensors
    data_files: list[str]
    schema_version: int = SCHEMA_VERSION

    def identity(self) -> dict[str, Any]:
        """Without what only says where it came from."""
        return {
            key: value for key, value in asdict(self).items() if key not in ("target", "target_revision", "data_files")
        }

    @property
    def digest(self) -> str:
        return _sha256(json.dumps(self.identity(), sort_keys=True))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> CacheSettings:
        """Raises KeyError or TypeError where the content does not fit."""
        return cls(**(content | {"rendering": CachedRendering(**content["rendering"])}))


@dataclass(frozen=True)
class ShardRecord:
    """A complete shard."""

    file: str  # relative to the cache
    first: int  # its first document
    end: int  # one past its last
    tokens: int
    bytes: int
    sha256: str
    settings: str  # `CacheSettings.digest`: a record of another cache counts for nothing

    def is_size_right(self, folder: Path) -> bool:
        file = folder / self.file
        return file.is_file() and file.stat().st_size == self.bytes


@dataclass(frozen=True)
class Manifest:
    settings: CacheSettings
    shards: list[ShardRecord]

    def to_json(self) -> dict[str, Any]:
        return asdict(self.settings) | {"shard_files": [asdict(shard) for shard in self.shards]}


def read_settings(folder: Path) -> CacheSettings:
    """What a cache, complete or not, is of.

    Raises:
        FileNotFoundError: there is none.
        CacheError: it is damaged, or of another schema version.
    """
    file = folder / SETTINGS
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _check_version(file, content)
        return CacheSettings.from_json(content)
    except DAMAGE as error:
        raise CacheError(
            f"{file}: damaged ({error!r}); delete it and run the same `python -m data_prep.cache` again"
        ) from error


def read_record(folder: Path, number: int) -> ShardRecord | None:
    """The completion record of a shard; None if there is none, or a damaged one."""
    try:
        return ShardRecord(**json.loads(record_file(folder, number).read_text(encoding="utf-8")))
    except (FileNotFoundError, *DAMAGE):
        return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete cache.

    Raises:
        CacheError: there is none, it is damaged, or of another schema version.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        _check_version(file, content)
        shards = [ShardRecord(**shard) for shard in content.pop("shard_files")]
        return Manifest(CacheSettings.from_json(content), shards)
    except FileNotFoundError as error:
        raise CacheError(_explain_absence(folder)) from error
    except DAMAGE as error:
        raise CacheError(f"{file}: damaged ({error!r}); {repair_command(folder)}") from error


def _check_version(file: Path, content: dict[str, Any]) -> None:
    version = content["schema_version"]
    if version != SCHEMA_VERSION:
        raise CacheError(
            f"{file}: a cache of schema version {version}, but this DeepSpec reads {SCHEMA_VERSION}; write it again in "
            "another folder, or use the DeepSpec that wrote it"
        )


def _explain_absence(folder: Path) -> str:
    if not (folder / SETTINGS).is_file():
        return (
            f"features.cache_dir={folder}: there is no feature cache; write it with `python -m data_prep.cache` and "
            "the keys of the training run"
        )
    shards = read_settings(folder).shards
    done = sum(read_record(folder, number) is not None for number in range(shards))
    return (
        f"features.cache_dir={folder}: the cache is not finished, {done} of {shards} shards are complete; run the same "
        "`python -m data_prep.cache` again, it goes on from there"
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
