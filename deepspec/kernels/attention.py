"""Block attention of a parallel drafter (DSpark section 3, DFlash section 3).

Each of A blocks of G slots attends the context tokens it may see and every slot of its own block, never another block.
One softmax runs over both parts. A block that sees no context still attends itself, so no row is ever empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

HIDDEN_SCORE = -1e30  # finite: a score that exp() turns into exactly 0


def block_attention(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """Attention of every block to its visible context and to itself.

    Args:
        query: [batch, heads, blocks, slots, head_dim]
        context_key, context_value: [batch, kv_heads, context, head_dim]; finite also where nothing is visible.
        block_key, block_value: [batch, kv_heads, blocks, slots, head_dim]
        visible: bool [batch, blocks, context], True = every slot of the block may attend this context token.
        scale: multiplies the scores.

    Returns:
        [batch, heads, blocks, slots, head_dim]
    """
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        return block_attention_single(query, context_key, context_value, block_key, block_value, visible, scale)
    if query.device.type == "cpu":
        return block_attention_joint(query, context_key, context_value, block_key, block_value, visible, scale)
    return block_attention_masked(query, context_key, context_value, block_key, block_value, visible, scale)


def block_attention_masked(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """The meaning of `block_attention`: one long masked attention over context and all blocks.

    Pays for the scores between blocks, but never stores scores where a memory-efficient kernel exists (GPU).
    """
    batch, heads, blocks, slots, _ = query.shape
    own_block = torch.eye(blocks, dtype=torch.bool, device=query.device)
    own_block = own_block.repeat_interleave(slots, 0).repeat_interleave(slots, 1).expand(batch, -1, -1)
    mask = torch.cat([visible.repeat_interleave(slots, 1), own_block], dim=-1)
    attended = functional.scaled_dot_product_attention(
        query.flatten(2, 3),
        torch.cat([context_key, block_key.flatten(2, 3)], dim=2).repeat_interleave(heads // block_key.shape[1], 1),
        torch.cat([context_value, block_value.flatten(2, 3)], dim=2).repeat_interleave(heads // block_key.shape[1], 1),
        attn_mask=mask[:, None],
        scale=scale,
    )
    return attended.view_as(query)


def block_attention_single(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """`block_attention` of one block per sequence, without gradients: a step of decoding.

    Reads the context where it lies; only scores are put together, never keys or values.
    """
    batch, heads, _, slots, head_dim = query.shape
    kv_heads, context = context_key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * slots, head_dim) * scale
    over_context = (grouped @ context_key.transpose(-1, -2)).masked_fill(~visible[:, None], HIDDEN_SCORE)
    over_block = grouped @ block_key[:, :, 0].transpose(-1, -2)
    weights = torch.cat([over_context, over_block], dim=-1).softmax(-1)
    attended = weights[..., :context] @ context_value + weights[..., context:] @ block_value[:, :, 0]
    return attended.view(query.shape)


def block_attention_joint(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """`block_attention` without the scores between blocks, in float32, with a written-out backward pass.

    Cost grows with blocks * (context + slots). About three times as fast as the masked form on a CPU.
    """
    batch, heads, blocks, slots, head_dim = query.shape
    kv_heads = block_key.shape[1]
    group = heads // kv_heads
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().view(batch, kv_heads, group, blocks, slots, head_dim).transpose(2, 3)
        grouped = grouped.reshape(batch, kv_heads, blocks, group * slots, head_dim) * scale
        bias = torch.zeros(visible.shape, device=query.device).masked_fill_(~visible, HIDDEN_SCORE)
        attended = _JointAttention.apply(
            grouped,
            context_key.float(),
            context_value.float(),
            block_key.float(),
            block_value.float(),
            bias[:, None, :, None, :],
        )
    attended = attended.view(batch, kv_heads, blocks, group, slots, head_dim).transpose(2, 3)
    return attended.reshape(query.shape).to(query.dtype)


class _JointAttention(torch.autograd.Function):
    """softmax([q Kc^T + bias ; q Kb^T]) [Vc ; Vb] with q grouped per key/value head.

    Shapes: query [b, k, a, n, h], context_* [b, k, c, h], block_* [b, k, a, g, h], bias [b, 1, a, 1, c].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        context_key: Tensor,
        context_value: Tensor,
        block_key: Tensor,
        block_value: Tensor,
        bias: Tensor,
    ) -> Tensor:
        context_scores = _over_context(query, context_key.transpose(-1, -2)).add_(bias)
        block_scores = query @ block_key.transpose(-1, -2)
        largest = block_scores.amax(-1, keepdim=True)
        if context_scores.shape[-1]:
            largest = torch.maximum(largest, context_scores.amax(-1, keepdim=True))
        context_weights = context_scores.sub_(largest).exp_()
        block_weights = block_scores.sub_(largest).exp_()
        total = context_weights.sum(-1, keepdim=True) + block_weights.sum(-1, keepdim=True)
        context_weights.div_(total)
        block_weights.div_(total)
        attended = _over_context(context_weights, context_value) + block_weights @ block_value
        ctx.save_for_backward(
            query, context_key, context_value, block_key, block_value, context_weights, block_weights, attended
        )
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, context_key, context_value, block_key, block_value, context_weights, block_weights, attended = (
            ctx.saved_tensors
        )
        gradient = gradient.contiguous()
        centre = (gradient * attended).sum(-1, keepdim=True)
        context_scores = _over_context(gradient, context_value.transpose(-1, -2)).sub_(centre).mul_(context_weights)
        block_scores = (gradient @ block_value.transpose(-1, -2)).sub_(centre).mul_(block_weights)
        return (
            _over_context(context_scores, context_key) + block_scores @ block_key,
            context_scores.flatten(2, 3).transpose(-1, -2) @ query.flatten(2, 3),
            context_weights.flatten(2, 3).transpose(-1, -2) @ gradient.flatten(2, 3),
            block_scores.transpose(-1, -2) @ query,
            block_weights.transpose(-1, -2) @ gradient,
            None,
        )


def _over_context(rows: Tensor, matrix: Tensor) -> Tensor:
    """[b, k, a, n, x] @ [b, k, x, y] -> [b, k, a, n, y]: one matrix product for all blocks of a key/value head."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])
