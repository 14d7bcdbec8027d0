"""Attention of packed new tokens over a slot cache: reads the cached keys and values where they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from deepspec.decoding.span import Span
from deepspec.targets.attention import current_layout, grouped_attention

SLOTS = "deepspec_slots"


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed tokens, each to its own row's columns up to itself. The layout is the `Span` of the tokens.

    Args:
        module: the attention layer; not used.
        query: [1, heads, total, head_dim]
        key, value: [rows, kv_heads, columns, head_dim], of the cache; those of values may be wider or narrower.
        attention_mask: not used.
        scaling, softcap: see `grouped_attention`.
        sliding_window: a token sees itself and this many columns less one before it; None = all before it.
        s_aux: [heads], attention sinks, see `grouped_attention`.

    Returns:
        [1, total, heads, head_dim], as Transformers wants it, and no weights.
    """
    span: Span = current_layout()
    query = span.to_rows(query[0].transpose(0, 1)).transpose(1, 2)
    mask = span.visible(sliding_window, query.shape[1] // key.shape[1])
    attended = grouped_attention(query, key, value, mask, scaling, softcap, s_aux)
    return span.to_packed(attended.transpose(1, 2))[None], None


AttentionInterface.register(SLOTS, slot_attention)
