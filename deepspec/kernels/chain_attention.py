"""Attention of a draft that feeds its states back (EAGLE-3, arXiv 2503.01840, training-time test).

Step t of a chain attends a span of context columns and the keys that its own chain has made in steps 0..t, never those
of another chain. It is block attention (`deepspec.kernels.attention`) with a single query and t + 1 keys to a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from deepspec.kernels.attention import (
    FLEX_OPTIONS,
    SMALLEST_FLEX_HEAD,
    ContextSpans,
    block_attention_chunked,
    block_attention_single,
    compiled_flex,
    flex_dtype,
)


@torch.compiler.disable
def chain_attention(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """Attention of the latest step of every chain.

    Args:
        query: [batch, heads, chains, head_dim]
        context_key, context_value: [batch, kv_heads, context, head_dim]; finite also where nothing is visible.
        own_key, own_value: [batch, kv_heads, chains, steps, head_dim], of the chain's steps so far.
        spans: the context columns that each chain sees, as a block's.
        scale: multiplies the scores.

    Returns:
        [batch, heads, chains, head_dim]
    """
    inputs = (query[:, :, :, None], context_key, context_value, own_key, own_value, spans, scale)
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        return block_attention_single(*inputs)[:, :, :, 0]
    if query.device.type == "cpu":
        return block_attention_chunked(*inputs)[:, :, :, 0]
    if query.device.type == "cuda" and query.shape[-1] >= SMALLEST_FLEX_HEAD:
        return chain_attention_flex(query, *inputs[1:])
    return chain_attention_masked(query, *inputs[1:])


def chain_attention_masked(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """The meaning of `chain_attention`: one long attention over context and all chains with a dense mask."""
    batch, heads, chains, _ = query.shape
    kv_heads, steps = own_key.shape[1], own_key.shape[3]
    own = torch.eye(chains, dtype=torch.bool, device=query.device).repeat_interleave(steps, 1).expand(batch, -1, -1)
    keys = torch.cat([context_key, own_key.flatten(2, 3)], dim=2)
    values = torch.cat([context_value, own_value.flatten(2, 3)], dim=2)
    return functional.scaled_dot_product_attention(
        query,
        keys.repeat_interleave(heads // kv_heads, 1),
        values.repeat_interleave(heads // kv_heads, 1),
        attn_mask=torch.cat([spans.visible(context_key.shape[2]), own], dim=-1)[:, None],
        scale=scale,
    )


def chain_attention_flex(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """`chain_attention` with FlexAttention over the context, joined with the few keys of the chain itself by the logs
    of the softmaxes' denominators. The mask over the context is that of every step: it is made and compiled once.
    """
    batch, heads, chains, head_dim = query.shape
    kv_heads = own_key.shape[1]
    dtype = flex_dtype(query)  # autocast does not know FlexAttention
    query, context_key, context_value = query.to(dtype), context_key.to(dtype), context_value.to(dtype)
    attend = compiled_flex() if query.device.type == "cuda" else flex_attention
    of_context, aux = attend(
        query,
        context_key,
        context_value,
        block_mask=spans.context_flex_mask(context_key.shape[2]),
        scale=scale,
        enable_gqa=heads != kv_heads,
        kernel_options=FLEX_OPTIONS,
        return_aux=AuxRequest(lse=True),
    )
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().view(batch, kv_heads, heads // kv_heads, chains, head_dim)
        own_scores = torch.einsum("bkgch,bkcsh->bkgcs", grouped, own_key.float()) * scale
        context_score = aux.lse.float().view(batch, kv_heads, heads // kv_heads, chains, 1)
        seen = (spans.last > spans.first)[:, None, None, :, None]
        context_score = torch.where(seen, context_score, -torch.inf)  # the log of an empty sum has no gradient
        weights = torch.cat([context_score, own_scores], dim=-1).softmax(-1)
        attended = torch.einsum("bkgcs,bkcsh->bkgch", weights[..., 1:], own_value.float())
        attended = attended + weights[..., :1] * of_context.float().view(grouped.shape)
    return attended.reshape(query.shape).to(dtype)
