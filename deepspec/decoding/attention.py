"""Attention of packed new tokens over a slot cache: reads the cached keys and values where they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from deepspec.decoding.cache import Span

SLOTS = "deepspec_slots"


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    span: Span,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention of packed tokens, without repeating keys and values for each query head.

    The query heads that share a key/value head are laid side by side as further tokens of that head.

    Args:
        module: the attention layer; not used.
        query: [1, heads, total, head_dim], of the packed tokens of `span`.
        key, value: [rows, kv_heads, columns, head_dim], of the cache.
        attention_mask: bool [rows, 1, longest, columns], True = may attend.
        scaling: multiplies the scores; None = 1 / sqrt(head_dim).

    Returns:
        [1, total, heads, head_dim], as Transformers wants it, and no weights.
    """
    query = span.to_rows(query[0].transpose(0, 1)).transpose(1, 2)
    rows, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if group > 1:
        query = query.reshape(rows, kv_heads, group * tokens, head_dim)
        if tokens > 1:
            attention_mask = attention_mask.repeat(1, 1, group, 1)
    attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return span.to_packed(attended.reshape(rows, heads, tokens, head_dim).transpose(1, 2))[None], None


AttentionInterface.register(SLOTS, slot_attention)
