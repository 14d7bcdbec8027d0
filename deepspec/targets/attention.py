"""Causal attention inside each document of a batch, without a mask over the whole row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig

from deepspec.data.packing import Document

DOCUMENTS = "deepspec_documents"


@contextmanager
def attend_with(config: PreTrainedConfig, name: str) -> Iterator[None]:
    """Within the block, layers of this config attend with the registered function `name`."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    documents: Sequence[Document] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Each document attends itself, causally; cost grows with the sum of squared document lengths.

    Args:
        module: the attention layer; not used.
        query: [rows, heads, tokens, head_dim]
        key, value: [rows, kv_heads, tokens, head_dim]
        attention_mask: not used.
        documents: where the documents of packed rows lie; None = every row is one document with padding at its end,
            which no real token can see.
        scaling: multiplies the scores; None = 1 / sqrt(head_dim).
        sliding_window: a token sees itself and this many tokens less one before it; None = all before it.

    Returns:
        [rows, tokens, heads, head_dim], as Transformers wants it, and no weights. Zero at the padding of packed rows.
    """
    if documents is None:
        return _causal(query, key, value, scaling, sliding_window).transpose(1, 2), None
    attended = torch.zeros_like(query)
    for document in documents:
        place = (slice(document.row, document.row + 1), slice(None), document.columns)
        attended[place] = _causal(query[place], key[place], value[place], scaling, sliding_window)
    return attended.transpose(1, 2), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    tokens = query.shape[2]
    band = None
    if window is not None and tokens > window:
        band = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril_().triu_(1 - window)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=band, is_causal=band is None, scale=scale, enable_gqa=True
    )


AttentionInterface.register(DOCUMENTS, document_attention)
