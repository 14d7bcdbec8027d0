"""Block attention of a parallel drafter (DSpark section 3, DFlash section 3).

Each of A blocks of G slots attends a span of context tokens and every slot of its own block, never another block. One
softmax runs over both parts. A block that sees no context still attends itself, so no row is ever empty.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

HIDDEN_SCORE = -1e30  # finite: a score that exp() turns into exactly 0
CHUNK_OVERHEAD = 2**16  # a further chunk on the CPU costs about as much as this many scores
LARGEST_CHUNK = 2**22  # scores in memory at once on the CPU
ALIGNED_SCORES = 8  # a row of scores is a multiple of so many long, or products with it take a slow kernel on GPUs
SMALLEST_FLEX_HEAD = 16  # head_dim that FlexAttention's GPU kernels can do
FLEX_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}  # its kernel for few queries has no backward pass
TILE = 128  # queries and keys of a tile of FlexAttention's masks


@dataclass(frozen=True)
class ContextSpans:
    """The context columns that every block sees: first <= column < last. Made once, used by every layer."""

    first: Tensor  # long [batch, blocks]
    last: Tensor  # long [batch, blocks]; = first where a block sees nothing
    _memory: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def visible(self, columns: int) -> Tensor:
        """bool [batch, blocks, columns]"""
        column = torch.arange(columns, device=self.first.device)
        return (column >= self.first[..., None]) & (column < self.last[..., None])

    def chunks(self, scores_per_column: int) -> list[Chunk]:
        """All blocks in runs of neighbours, cut where sharing columns would waste more than another run costs.

        Args:
            scores_per_column: of one block, over the whole batch: batch * heads * slots.
        """
        return self._made(("chunks", scores_per_column), lambda: self._make_chunks(scores_per_column))

    def flex_mask(self, slots: int, columns: int) -> BlockMask:
        """For queries [blocks * slots] and keys [columns of context, then blocks * slots]."""
        return self._made(("flex", slots, columns), lambda: self._make_flex_mask(slots, columns))

    def context_flex_mask(self, columns: int) -> BlockMask:
        """For queries [blocks] and keys [columns of context]."""
        return self._made(("context", columns), lambda: self._make_context_flex_mask(columns))

    def _made(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]

    def _make_chunks(self, scores_per_column: int) -> list[Chunk]:
        firsts, lasts = self.first.amin(0).tolist(), self.last.amax(0).tolist()
        return _chunks(firsts, lasts, CHUNK_OVERHEAD / scores_per_column, LARGEST_CHUNK / scores_per_column)

    def _make_flex_mask(self, slots: int, columns: int) -> BlockMask:
        first, last = self.first, self.last
        queries = first.shape[1] * slots
        context = torch.tensor(columns, device=first.device)  # not a number: a kernel would be compiled for each

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            block = query // slots
            in_span = (key >= first[batch, block]) & (key < last[batch, block])
            return torch.where(key < context, in_span, (key - context) // slots == block)

        own = columns + torch.arange(queries, device=first.device)[None] // slots * slots
        seen = (first.repeat_interleave(slots, 1), last.repeat_interleave(slots, 1))
        return _mask_of_spans([seen, (own, own + slots)], columns + queries, sees)

    def _make_context_flex_mask(self, columns: int) -> BlockMask:
        first, last = self.first, self.last

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first[batch, query]) & (key < last[batch, query])

        return _mask_of_spans([(first, last)], columns, sees)


@dataclass(frozen=True)
class Chunk:
    """A run of blocks and the columns that any of them sees."""

    blocks: slice
    columns: slice


def _mask_of_spans(spans: Sequence[tuple[Tensor, Tensor]], keys: int, sees: Callable[..., Tensor]) -> BlockMask:
    """The mask of queries that see these keys. As `create_block_mask` makes it, which takes minutes to compile at some
    lengths (pytorch issue 182060), and uncompiled writes down every query times every key.

    Args:
        spans: [batch or 1, queries] each, the first key and that behind the last; they do not overlap.
        sees: the same by batch, head, query and key.
    """
    queries, device = spans[0][0].shape[1], spans[0][0].device
    starts = torch.arange(0, keys, TILE, device=device)
    ends = (starts + TILE).clamp(max=keys)
    some = every = torch.zeros((), dtype=torch.bool, device=device)
    for span in spans:
        first, last = (bound[..., None] for bound in span)
        some = some | ((first < ends) & (last > starts) & (first < last))
        every = every | ((first <= starts) & (last >= starts + TILE))
    some, every = (_by_tile(seen) for seen in (some, every))  # [batch, 1, tiles of queries, TILE, tiles of keys]
    whole = every.all(3)
    partly, fully = (_in_order(tiles) for tiles in (some.any(3) & ~whole, whole))
    return BlockMask.from_kv_blocks(*partly, *fully, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(queries, keys))


def _by_tile(seen: Tensor) -> Tensor:
    """[batch, queries, keys] -> [batch, 1, tiles, TILE, keys], where queries that are not there see nothing."""
    padded = functional.pad(seen, (0, 0, 0, -seen.shape[1] % TILE))
    return padded.unflatten(1, (-1, TILE))[:, None]


def _in_order(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of tiles, bool [..., keys], how many are set and their numbers, followed by the other numbers."""
    order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.int()


def _chunks(firsts: list[int], lasts: list[int], overhead: float, largest: float) -> list[Chunk]:
    """Greedy: a block joins the run while the columns that are computed for nothing cost less than another run.

    Args:
        firsts, lasts: span of every block.
        overhead: price of a run, in blocks * columns.
        largest: the most blocks * columns of a run of more than one block.
    """
    chunks: list[Chunk] = []
    start, low, high, needed = 0, firsts[0], lasts[0], 0
    for block, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        needed += last - first
        joint = (block + 1 - start) * (max(high, last) - min(low, first))
        if block > start and (joint > needed + overhead or joint > largest):
            chunks.append(Chunk(slice(start, block), slice(low, high)))
            start, low, high, needed = block, first, last, last - first
        low, high = min(low, first), max(high, last)
    return [*chunks, Chunk(slice(start, len(firsts)), slice(low, high))]


@torch.compiler.disable
def block_attention(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """Attention of every block to its span of the context and to itself.

    Args:
        query: [batch, heads, blocks, slots, head_dim]
        context_key, context_value: [batch, kv_heads, context, head_dim]; finite also where nothing is visible.
        block_key, block_value: [batch, kv_heads, blocks, slots, head_dim]
        spans: of the blocks.
        scale: multiplies the scores.

    Returns:
        [batch, heads, blocks, slots, head_dim]
    """
    inputs = (query, context_key, context_value, block_key, block_value, spans, scale)
    if query.shape[2] == 1 and not torch.is_grad_enabled():
        return block_attention_single(*inputs)
    if query.device.type == "cpu":
        return block_attention_chunked(*inputs)
    if query.device.type == "cuda" and query.shape[-1] >= SMALLEST_FLEX_HEAD:
        return block_attention_flex(*inputs)
    return block_attention_masked(*inputs)


def block_attention_masked(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """The meaning of `block_attention`: one long attention over context and all blocks with a dense mask."""
    batch, heads, blocks, slots, _ = query.shape
    own_block = torch.eye(blocks, dtype=torch.bool, device=query.device)
    own_block = own_block.repeat_interleave(slots, 0).repeat_interleave(slots, 1).expand(batch, -1, -1)
    visible = spans.visible(context_key.shape[2]).repeat_interleave(slots, 1)
    keys, values = _joined(context_key, context_value, block_key, block_value)
    attended = functional.scaled_dot_product_attention(
        query.flatten(2, 3),
        keys.repeat_interleave(heads // block_key.shape[1], 1),
        values.repeat_interleave(heads // block_key.shape[1], 1),
        attn_mask=torch.cat([visible, own_block], dim=-1)[:, None],
        scale=scale,
    )
    return attended.view_as(query)


def block_attention_flex(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """`block_attention` by FlexAttention: neither scores nor a dense mask exist, and hidden tiles are not computed."""
    heads, slots = query.shape[1], query.shape[3]
    keys, values = _joined(context_key, context_value, block_key, block_value)
    dtype = flex_dtype(query)
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)  # autocast does not know FlexAttention
    attend = compiled_flex() if query.device.type == "cuda" else flex_attention
    attended = attend(
        query.flatten(2, 3),
        keys,
        values,
        block_mask=spans.flex_mask(slots, context_key.shape[2]),
        scale=scale,
        enable_gqa=heads != block_key.shape[1],
        kernel_options=FLEX_OPTIONS,
    )
    return attended.view_as(query)


@cache
def compiled_flex() -> Any:
    return torch.compile(flex_attention, fullgraph=True)  # an error where it would go on unfused after many shapes


def flex_dtype(query: Tensor) -> torch.dtype:
    """What autocast would convert the query, keys and values to."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _joined(
    context_key: Tensor, context_value: Tensor, block_key: Tensor, block_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, kv_heads, context + blocks * slots, head_dim]"""
    return (
        torch.cat([context_key, block_key.flatten(2, 3)], dim=2),
        torch.cat([context_value, block_value.flatten(2, 3)], dim=2),
    )


def block_attention_single(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """`block_attention` of one block per sequence, without gradients: a step of decoding.

    Reads the context where it lies; only scores are put together, never keys or values.
    """
    batch, heads, _, slots, head_dim = query.shape
    kv_heads, context = context_key.shape[1:3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * slots, head_dim) * scale
    hidden = ~spans.visible(context)[:, None]
    over_context = (grouped @ context_key.transpose(-1, -2)).masked_fill(hidden, HIDDEN_SCORE)
    over_block = grouped @ block_key[:, :, 0].transpose(-1, -2)
    own = block_key.shape[3]
    padding = over_block.new_full((*over_block.shape[:-1], -own % ALIGNED_SCORES), HIDDEN_SCORE)
    weights = torch.cat([over_context, over_block, padding], dim=-1).softmax(-1)
    attended = weights[..., :context] @ context_value + weights[..., context : context + own] @ block_value[:, :, 0]
    return attended.reshape(query.shape)


def block_attention_chunked(
    query: Tensor,
    context_key: Tensor,
    context_value: Tensor,
    block_key: Tensor,
    block_value: Tensor,
    spans: ContextSpans,
    scale: float,
) -> Tensor:
    """`block_attention` in float32 for a CPU: a few neighbouring blocks at a time over the columns they see.

    Only the log of the softmax's denominator is kept for the backward pass, which computes the scores again, so memory
    grows with blocks + context. Cost grows with the spans, not with the length of the row.
    """
    batch, heads, blocks, slots, head_dim = query.shape
    kv_heads = block_key.shape[1]
    group = heads // kv_heads
    with torch.autocast(query.device.type, enabled=False):
        grouped = query.float().view(batch, kv_heads, group, blocks, slots, head_dim).transpose(2, 3)
        grouped = grouped.reshape(batch, kv_heads, blocks, group * slots, head_dim) * scale
        attended = _ChunkedAttention.apply(
            grouped,
            context_key.float(),
            context_value.float(),
            block_key.float(),
            block_value.float(),
            spans,
            spans.chunks(batch * heads * slots),
        )
    attended = attended.view(batch, kv_heads, blocks, group, slots, head_dim).transpose(2, 3)
    return attended.reshape(query.shape).to(query.dtype)


class _ChunkedAttention(torch.autograd.Function):
    """softmax([q Kc^T ; q Kb^T]) [Vc ; Vb] with q grouped per key/value head and scaled.

    Shapes: query [b, k, a, n, h], context_* [b, k, c, h], block_* [b, k, a, g, h].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        context_key: Tensor,
        context_value: Tensor,
        block_key: Tensor,
        block_value: Tensor,
        spans: ContextSpans,
        chunks: list[Chunk],
    ) -> Tensor:
        block_scores = query @ block_key.transpose(-1, -2)
        attended = torch.empty_like(query)
        log_total = query.new_empty(*query.shape[:-1], 1)
        for chunk in chunks:
            over_block = block_scores[:, :, chunk.blocks]
            over_context = _context_scores(query, context_key, spans, chunk)
            largest = over_block.amax(-1, keepdim=True)
            if over_context.shape[-1]:
                largest = torch.maximum(largest, over_context.amax(-1, keepdim=True))
            over_context.sub_(largest).exp_()
            over_block.sub_(largest).exp_()
            total = over_context.sum(-1, keepdim=True).add_(over_block.sum(-1, keepdim=True))
            result = _over_context(over_context, context_value[:, :, chunk.columns])
            result += over_block @ block_value[:, :, chunk.blocks]
            attended[:, :, chunk.blocks] = result.div_(total)
            log_total[:, :, chunk.blocks] = total.log_().add_(largest)
        ctx.save_for_backward(query, context_key, context_value, block_key, block_value, attended, log_total)
        ctx.spans, ctx.chunks = spans, chunks
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, context_key, context_value, block_key, block_value, attended, log_total = ctx.saved_tensors
        gradient = gradient.contiguous()
        centre = (gradient * attended).sum(-1, keepdim=True)
        block_weights = (query @ block_key.transpose(-1, -2)).sub_(log_total).exp_()
        block_scores = (gradient @ block_value.transpose(-1, -2)).sub_(centre).mul_(block_weights)
        query_gradient = block_scores @ block_key
        key_gradient, value_gradient = torch.zeros_like(context_key), torch.zeros_like(context_value)
        for chunk in ctx.chunks:
            rows = (slice(None), slice(None), chunk.blocks)
            columns = (slice(None), slice(None), chunk.columns)
            weights = _context_scores(query, context_key, ctx.spans, chunk).sub_(log_total[rows]).exp_()
            scores = _over_context(gradient[rows], context_value[columns].transpose(-1, -2))
            scores.sub_(centre[rows]).mul_(weights)
            query_gradient[rows] += _over_context(scores, context_key[columns])
            key_gradient[columns] += scores.flatten(2, 3).transpose(-1, -2) @ query[rows].flatten(2, 3)
            value_gradient[columns] += weights.flatten(2, 3).transpose(-1, -2) @ gradient[rows].flatten(2, 3)
        return (
            query_gradient,
            key_gradient,
            value_gradient,
            block_scores.transpose(-1, -2) @ query,
            block_weights.transpose(-1, -2) @ gradient,
            None,
            None,
        )


def _context_scores(query: Tensor, context_key: Tensor, spans: ContextSpans, chunk: Chunk) -> Tensor:
    """Scores of a chunk's blocks over its columns, hidden ones at HIDDEN_SCORE: [b, k, blocks, n, columns]"""
    scores = _over_context(query[:, :, chunk.blocks], context_key[:, :, chunk.columns].transpose(-1, -2))
    columns = torch.arange(chunk.columns.start, chunk.columns.stop, device=scores.device)
    first, last = spans.first[:, chunk.blocks, None], spans.last[:, chunk.blocks, None]
    hidden = (columns < first) | (columns >= last)  # [b, blocks, columns]
    bias = torch.zeros(hidden.shape, device=scores.device).masked_fill_(hidden, HIDDEN_SCORE)
    return scores.add_(bias[:, None, :, None])


def _over_context(rows: Tensor, matrix: Tensor) -> Tensor:
    """[b, k, a, n, x] @ [b, k, x, y] -> [b, k, a, n, y]: one matrix product for all blocks of a key/value head."""
    return (rows.flatten(2, 3) @ matrix).unflatten(2, rows.shape[2:4])
