"""Writing new keys and values into preallocated caches by slot and position, in place."""

from __future__ import annotations

from torch import Tensor

from deepspec.kernels.dispatch import runs_in_triton

PADDING = -1  # position of a token that is not there


def append_key_values(
    keys_cache: Tensor,
    values_cache: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    implementation: str | None = None,
) -> None:
    """cache[slots[t], :, positions[t]] = new[t] for keys and values, and nothing where a position is outside the cache.

    So a fixed number of tokens can be passed, the unused ones at position PADDING. No two tokens may go to the same
    place. The Triton kernel writes both caches in one launch and never waits for the GPU; the plain one waits for it.

    Args:
        keys_cache, values_cache: [slots, kv_heads, columns, head_dim], of the same strides, the last of them 1;
            written.
        keys, values: [tokens, kv_heads, head_dim] of the caches' dtype, the last stride 1, the others as they are: of
            the [1, kv_heads, tokens, head_dim] that Transformers hands to a cache, `keys[0].transpose(0, 1)`.
        slots: integers [tokens]; not read for padding.
        positions: integers [tokens]
        implementation: "plain" or "triton"; None = triton on a GPU where it is installed.
    """
    _, heads, columns, head_dim = keys_cache.shape
    assert keys.shape == values.shape == (len(slots), heads, head_dim)
    assert slots.shape == positions.shape
    assert keys_cache.shape == values_cache.shape
    assert keys_cache.stride() == values_cache.stride()
    assert all(
        new.stride(-1) == 1 and new.dtype == keys_cache.dtype for new in (keys, values, keys_cache, values_cache)
    )
    if runs_in_triton(keys_cache, implementation):
        from deepspec.kernels import key_values_triton  # imports Triton, which not everybody has

        return key_values_triton.append_key_values(keys_cache, values_cache, keys, values, slots, positions)
    kept = (positions >= 0) & (positions < columns)
    slots, positions = slots[kept], positions[kept]
    keys_cache[slots, :, positions] = keys[kept]
    values_cache[slots, :, positions] = values[kept]
