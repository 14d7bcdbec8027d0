"""The tensors of a checkpoint as they lie in its files: names, shapes and bytes. Weights are copied, never decoded.

So a draft of any size is rewritten with a few MiB of memory, and what comes out is bit for bit what went in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from deepspec.config import ConfigError
from deepspec.files import INDEX_FILE, SINGLE_FILE, safetensors_header, weight_files
from deepspec.publishing.errors import PublishError

SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 16 * 2**20
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str  # the format's code: F32, BF16, I64, BOOL, ...
    shape: tuple[int, ...]
    start: int  # first byte in the file
    size: int  # bytes

    def chunks(self) -> Iterator[bytes]:
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise PublishError(f"{self.file}: ends before its last tensor; copy or download it again")
                left -= len(chunk)
                yield chunk

    def load(self) -> Tensor:
        """Into memory; for small ones, of a dtype in `TORCH_DTYPES`."""
        content = bytearray(b"".join(self.chunks()))
        return torch.frombuffer(content, dtype=TORCH_DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory, where a file does not hold it."""

    tensor: Tensor

    @property
    def dtype(self) -> str:
        return DTYPE_CODES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        return self.tensor.nbytes

    def chunks(self) -> Iterator[bytes]:
        flat = self.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, len(flat), CHUNK_BYTES):
            yield flat[start : start + CHUNK_BYTES].numpy().tobytes()

    def load(self) -> Tensor:
        return self.tensor


AnyTensor = StoredTensor | HeldTensor


def read_tensors(folder: Path) -> dict[str, AnyTensor]:
    """Every tensor of a checkpoint, from one file or several with an index. Reads headers alone.

    Raises:
        PublishError: a file is missing, damaged or incomplete.
    """
    try:
        files = weight_files(folder)
    except (ConfigError, FileNotFoundError) as error:
        raise PublishError(str(error)) from error
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        PublishError: it is damaged or incomplete.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ValueError("no header")
            entries = json.loads(opened.read(length))
        tensors = {name: _stored(file, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PublishError(f"{file}: no safetensors file, or damaged ({error}); copy or download it again") from error
    if any(tensor.start + tensor.size > size for tensor in tensors.values()):
        raise PublishError(f"{file}: damaged or incomplete, it ends before its last tensor; copy or download it again")
    return tensors


def _stored(file: Path, entry: Mapping[str, Any], first_byte: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), first_byte + start, end - start)


def write_tensors(folder: Path, tensors: Mapping[str, AnyTensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of up to `shard_bytes` with an index. The folder must be there and empty."""
    shards: list[dict[str, AnyTensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.size for other in shards[-1].values()) + tensor.size > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0])
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        _write_file(folder / file_name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors.values())},
        "weight_map": {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Mapping[str, AnyTensor]) -> None:
    with path.open("wb") as file:
        header = {name: (tensor.dtype, tensor.shape, tensor.size) for name, tensor in tensors.items()}
        file.write(safetensors_header(header, {"format": "pt"}))
        for tensor in tensors.values():
            _copy(tensor, file)


def _copy(tensor: AnyTensor, file: IO[bytes]) -> None:
    for chunk in tensor.chunks():
        file.write(chunk)
