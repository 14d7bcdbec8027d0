"""Causal attention inside each document of a batch, without a mask over the whole row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedConfig

from deepspec.data.packing import Document

DOCUMENTS = "deepspec_documents"
QUERIES_AT_ONCE = 512  # where scores or a mask are made: bounds their memory, and what a window computes for nothing


# Where the tokens of the running pass lie, for our attention functions. Not a keyword argument of the model's forward:
# some families do not hand those down to their attention.
_layout: ContextVar[Any] = ContextVar("layout")


@contextmanager
def attend_with(config: PreTrainedConfig, name: str, layout: Any) -> Iterator[None]:
    """Within the block, layers of this config attend with the registered function `name`.

    Transformers makes no masks for a function whose name it does not know: ours see to that themselves.

    Args:
        layout: what that function gets from `current_layout`.
    """
    before, token = config._attn_implementation, _layout.set(layout)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
        _layout.reset(token)


def current_layout() -> Any:
    """The `layout` of the innermost `attend_with`."""
    return _layout.get()


def document_attention(
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
    """Each document attends itself, causally; cost grows with the sum of squared document lengths.

    The layout says where the documents of packed rows lie; None = every row is one document with padding at its end,
    which no real token can see.

    Args:
        module: the attention layer; not used.
        query: [rows, heads, tokens, head_dim]
        key, value: [rows, kv_heads, tokens, head_dim]; those of values may be wider or narrower.
        attention_mask: not used.
        scaling: multiplies the scores; None = 1 / sqrt(head_dim).
        sliding_window: a token sees itself and this many tokens less one before it; None = all before it.
        softcap: see `grouped_attention`.
        s_aux: [heads], attention sinks, see `grouped_attention`.

    Returns:
        [rows, tokens, heads, head_dim], as Transformers wants it, and no weights. Zero at the padding of packed rows.
    """
    options = (scaling, sliding_window, softcap, s_aux)
    documents: Sequence[Document] | None = current_layout()
    if documents is None:
        return _causal(query, key, value, *options).transpose(1, 2), None
    attended = query.new_zeros(*query.shape[:3], value.shape[-1])
    for document in documents:
        place = (slice(document.row, document.row + 1), slice(None), document.columns)
        attended[place] = _causal(query[place], key[place], value[place], *options)
    return attended.transpose(1, 2), None


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    tokens = query.shape[2]
    if softcap is None and sinks is None and (window is None or tokens <= window):
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    group = query.shape[1] // key.shape[1]
    attended = []
    for start in range(0, tokens, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, tokens)
        first = 0 if window is None else max(0, start + 1 - window)
        rows = torch.arange(start, end, device=query.device)[:, None]
        visible = visible_columns(rows, torch.arange(first, end, device=query.device), window)
        columns = (slice(None), slice(None), slice(first, end))
        mask = visible.repeat(group, 1)[None, None]
        attended.append(
            grouped_attention(query[:, :, start:end], key[columns], value[columns], mask, scale, softcap, sinks)
        )
    return torch.cat(attended, dim=2)


def visible_columns(positions: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Whether a token at a position sees a column: itself and all before it, or the nearest `window` of these."""
    visible = columns <= positions
    return visible if window is None else visible & (columns > positions - window)


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention without repeating keys and values for each of the query heads that share them.

    These heads are laid behind one another as further tokens of their key/value head.

    Args:
        query: [rows, heads, tokens, head_dim]
        key: [rows, kv_heads, columns, head_dim]
        value: [rows, kv_heads, columns, value_dim]
        mask: bool [rows or 1, 1, heads / kv_heads * tokens, columns], True = may attend; the same for every head.
        scale: multiplies the scores; None = 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        sinks: [heads], a score of each head that takes part in the softmax and carries no value (gpt-oss).

    Returns:
        [rows, heads, tokens, value_dim]
    """
    rows, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(rows, kv_heads, heads // kv_heads * tokens, head_dim)
    if softcap is None and sinks is None:
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return attended.reshape(rows, heads, tokens, -1)
    scores = (query @ key.transpose(-1, -2)).float() * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        of_token = sinks.float().view(kv_heads, -1, 1).expand(-1, -1, tokens).reshape(1, kv_heads, -1, 1)
        scores = torch.cat([scores, of_token.expand(rows, -1, -1, -1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return (weights @ value).reshape(rows, heads, tokens, -1)


AttentionInterface.register(DOCUMENTS, document_attention)
