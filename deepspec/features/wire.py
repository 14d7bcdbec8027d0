"""What trainer and feature server say to each other: safetensors bytes, written and read without copying a tensor.

A message is a safetensors file (https://github.com/huggingface/safetensors#format), so its library reads and writes it
too; here the tensors are views of the bytes instead, because an answer is tens of megabytes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepspec.files import safetensors_header

FORMAT = 1  # of the messages; servers and trainers of different formats refuse each other
MEDIA_TYPE = "application/octet-stream"
TOKEN_VARIABLE = "DEEPSPEC_FEATURES_TOKEN"  # environment: a secret that servers and trainers share; unset = none
MAX_HEADER = 1 << 16  # bytes
FEATURE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPES = {"I32": torch.int32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WireError(ValueError):
    """Bytes that are not the message they should be."""


@dataclass(frozen=True)
class FeatureRequest:
    """Documents whose features are wanted."""

    input_ids: Tensor  # int32 [tokens], documents behind one another
    lengths: tuple[int, ...]  # tokens of each document
    final_places: Tensor  # int32 [wanted], increasing: where in `input_ids` the final state is wanted
    layer_ids: tuple[int, ...]  # captured layers, -1 = embedding output
    dtype: torch.dtype  # of the answer
    id: str  # any text; the answer repeats it

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class FeatureAnswer:
    """Features of a request's documents."""

    context: Tensor  # [tokens, captured layers * hidden]
    final: Tensor  # [wanted, hidden], after the final norm
    fingerprint: str  # of the target that computed them
    request_id: str


def encode_request(request: FeatureRequest) -> list[memoryview]:
    metadata = {
        "format": str(FORMAT),
        "id": request.id,
        "layer_ids": json.dumps(request.layer_ids),
        "dtype": str(request.dtype).removeprefix("torch."),
    }
    lengths = torch.tensor(request.lengths, dtype=torch.int32)
    tensors = {"input_ids": request.input_ids, "lengths": lengths, "final_places": request.final_places}
    return encode(metadata, tensors)


def decode_request(message: Tensor) -> FeatureRequest:
    """Read a request: uint8 [bytes] -> request. Checks its form, not whether a target can answer it.

    Raises:
        WireError: says what is wrong.
    """
    metadata, tensors = decode(message)
    _check_format(metadata)
    for name in ("input_ids", "lengths", "final_places"):
        if name not in tensors or tensors[name].dtype != torch.int32 or tensors[name].ndim != 1:
            raise WireError(f"{name}: must be an int32 tensor of one dimension")
    if metadata.get("dtype") not in FEATURE_DTYPES:
        raise WireError(f"dtype={metadata.get('dtype')}: must be one of {', '.join(FEATURE_DTYPES)}")
    input_ids, places = tensors["input_ids"], tensors["final_places"]
    lengths = tuple(tensors["lengths"].tolist())
    if not lengths or min(lengths) < 1 or sum(lengths) != input_ids.shape[0]:
        raise WireError(
            f"lengths: must be positive and sum to the {input_ids.shape[0]} tokens of input_ids; "
            f"got {len(lengths)} lengths that sum to {sum(lengths)}"
        )
    if places.numel() and not (places[0] >= 0 and places[-1] < input_ids.shape[0] and bool((places.diff() > 0).all())):
        raise WireError(f"final_places: must increase and lie in 0 to {input_ids.shape[0] - 1}")
    dtype = FEATURE_DTYPES[metadata["dtype"]]
    return FeatureRequest(input_ids, lengths, places, _layer_ids(metadata), dtype, metadata.get("id", ""))


def encode_answer(answer: FeatureAnswer) -> list[memoryview]:
    metadata = {"format": str(FORMAT), "fingerprint": answer.fingerprint, "id": answer.request_id}
    return encode(metadata, {"context": answer.context, "final": answer.final})


def decode_answer(message: Tensor, request: FeatureRequest, hidden_size: int) -> FeatureAnswer:
    """Read the answer to `request`: uint8 [bytes] -> views of them.

    Raises:
        WireError: not an answer, or not to this request.
    """
    metadata, tensors = decode(message)
    _check_format(metadata)
    if metadata.get("id") != request.id:
        raise WireError(f"an answer to request '{metadata.get('id')}' instead of '{request.id}'")
    width = len(request.layer_ids) * hidden_size
    shapes = {"context": [request.tokens, width], "final": [request.final_places.shape[0], hidden_size]}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or list(tensor.shape) != shape or tensor.dtype != request.dtype:
            found = "nothing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
            raise WireError(f"{name}: expected {shape} of {request.dtype}, got {found}")
    return FeatureAnswer(tensors["context"], tensors["final"], metadata.get("fingerprint", ""), request.id)


def encode(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """A safetensors file in pieces, the tensors' own memory among them; they must not change until it is sent."""
    pieces = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().data for name, tensor in tensors.items()}
    entries = {name: (_NAMES[tensor.dtype], tensor.shape, len(pieces[name])) for name, tensor in tensors.items()}
    return [memoryview(safetensors_header(entries, metadata)), *pieces.values()]


def decode(message: Tensor) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file in memory: uint8 [bytes] -> tensors that share its memory.

    Raises:
        WireError: it is none, or it is cut off.
    """
    size = message.shape[0]
    length = struct.unpack("<Q", bytes(message[:8].numpy()))[0] if size >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER, size - 8) or length % 8:
        raise WireError(f"{size} bytes that are no safetensors message: the header's length is wrong")
    try:
        entries = json.loads(bytes(message[8 : 8 + length].numpy()))
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__").items()}
        tensors = {name: _view(message[8 + length :], entry) for name, entry in entries.items()}
    except WireError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise WireError(f"no safetensors message: {type(error).__name__}: {error}") from error
    covered = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if covered != size - 8 - length:
        raise WireError(f"the header describes {covered} bytes of tensors, {size - 8 - length} came")
    return metadata, tensors


def _view(data: Tensor, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]], entry["data_offsets"]
    expected = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or not 0 <= start <= end <= data.shape[0] or end - start != expected:
        raise WireError(f"a tensor of {shape} {entry['dtype']} cannot lie at bytes {start} to {end} of {data.shape[0]}")
    return data[start:end].view(dtype).view(shape)


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != str(FORMAT):
        raise WireError(f"format {metadata.get('format')}: this side speaks format {FORMAT}; use the same version")


def _layer_ids(metadata: Mapping[str, str]) -> tuple[int, ...]:
    try:
        layer_ids: Sequence[Any] = json.loads(metadata["layer_ids"])
        if not layer_ids or any(type(layer_id) is not int for layer_id in layer_ids):
            raise ValueError
    except (KeyError, ValueError, TypeError) as error:
        raise WireError(f"layer_ids={metadata.get('layer_ids')}: must be a JSON list of integers") from error
    return tuple(layer_ids)
