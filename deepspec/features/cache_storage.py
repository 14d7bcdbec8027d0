"""Number formats of stored features: two that only round, two with a scale per token and captured layer.

The final states stay in bfloat16 where the context is stored in eight bits: they are the targets of the loss, and a
target that computes in bfloat16 then loses nothing. docs/features.md has what was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """How features lie on disk."""

    context: torch.dtype
    final: torch.dtype
    largest: float | None = None  # the largest magnitude of each token and layer is scaled to this; None = no scales

    def context_bytes(self, layers: int, hidden: int) -> int:
        """Of one token, with its scales."""
        return layers * (hidden * self.context.itemsize + (SCALE.itemsize if self.largest else 0))

    def final_bytes(self, hidden: int) -> int:
        """Of one position."""
        return hidden * self.final.itemsize


# float32 costs 4 of some thousands of bytes. Unlike float16 it holds the scale of any float32 or bfloat16 state.
SCALE = torch.float32
STORAGES = {
    "float32": Storage(torch.float32, torch.float32),
    "bfloat16": Storage(torch.bfloat16, torch.bfloat16),
    "float8": Storage(torch.float8_e4m3fn, torch.bfloat16, largest=torch.finfo(torch.float8_e4m3fn).max),
    "int8": Storage(torch.int8, torch.bfloat16, largest=127.0),
}


def compress(context: Tensor, layers: int, storage: Storage) -> tuple[Tensor, Tensor | None]:
    """Context features as they are stored.

    Args:
        context: [tokens, layers * hidden]

    Returns:
        [tokens, layers * hidden] in `storage.context` and, for eight-bit storage, the scales [tokens, layers].
    """
    if storage.largest is None:
        return context.to(storage.context), None
    by_layer = context.to(SCALE).unflatten(1, (layers, -1))
    scales = (by_layer.abs().amax(-1) / storage.largest).clamp(min=torch.finfo(SCALE).tiny)
    scaled = (by_layer / scales[..., None]).clamp(-storage.largest, storage.largest)
    if not storage.context.is_floating_point:
        scaled = scaled.round()
    return scaled.to(storage.context).flatten(1), scales


def restore(values: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inverse of `compress`, up to rounding: [tokens, layers * hidden] in `dtype`."""
    if scales is None:
        return values.to(dtype)
    by_layer = values.to(SCALE).unflatten(1, (scales.shape[1], -1))
    return (by_layer * scales[..., None]).flatten(1).to(dtype)
