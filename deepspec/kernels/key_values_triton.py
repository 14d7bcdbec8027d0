"""New keys and values into their caches, in one Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def append_key_values(
    keys_cache: Tensor, values_cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
) -> None:
    """The same as `key_values.append_key_values`; one program per token."""
    tokens, heads, head_dim = keys.shape
    with torch.cuda.device_of(keys_cache):
        _append[(tokens,)](
            keys_cache,
            values_cache,
            keys,
            values,
            slots,
            positions,
            slots.stride(0),
            positions.stride(0),
            *keys_cache.stride()[:3],
            *keys.stride()[:2],
            *values.stride()[:2],
            heads,
            keys_cache.shape[2],
            head_dim,
            HEADS=triton.next_power_of_2(heads),
            HEAD_DIM=triton.next_power_of_2(head_dim),
        )


@triton.jit
def _append(
    keys_cache,
    values_cache,
    keys,
    values,
    slots,
    positions,
    slots_stride,
    positions_stride,
    cache_slot_stride,
    cache_head_stride,
    cache_column_stride,
    keys_token_stride,
    keys_head_stride,
    values_token_stride,
    values_head_stride,
    heads,
    columns,
    head_dim,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token * slots_stride).to(tl.int64)  # a cache can have more than 2**31 elements
    position = tl.load(positions + token * positions_stride).to(tl.int64)
    if (position >= 0) & (position < columns):
        head = tl.arange(0, HEADS)[:, None].to(tl.int64)
        feature = tl.arange(0, HEAD_DIM)[None, :]
        exists = (head < heads) & (feature < head_dim)
        place = slot * cache_slot_stride + head * cache_head_stride + position * cache_column_stride + feature
        key = tl.load(keys + token * keys_token_stride + head * keys_head_stride + feature, mask=exists)
        value = tl.load(values + token * values_token_stride + head * values_head_stride + feature, mask=exists)
        tl.store(keys_cache + place, key, mask=exists)
        tl.store(values_cache + place, value, mask=exists)
