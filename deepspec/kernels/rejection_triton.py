"""Rejection sampling from the target's logits in Triton: four kernels for token verification, six for block.

1. The largest logit of each chunk of each proposed position, its index and the sum of exponentials: reads the logits.
2. One program per row: the same of each position, and what the rule makes of the drafted tokens' probabilities.
3. Block verification: the surplus of each chunk of each position, then one program per row for the number kept.
4. The mass of each chunk of max(scale * p_t - p_d, 0), and of p_t, at the first token not kept.
5. One program per row chooses the chunk by the masses, then the token in it.

Probabilities are float32 and come from one function, so that a token is tested by the very number that draws it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspec.kernels.inversion_triton import CHUNK, choose_chunk, first_above


class Batch(NamedTuple):
    """What the kernels read, then what they write; `positions` = slots + 1 of every row, used or not."""

    tokens: Tensor
    tokens_strides: tuple[int, ...]
    draft: Tensor
    draft_strides: tuple[int, ...]
    logits: Tensor
    logits_stride: int
    temperatures: Tensor
    lengths: Tensor | None
    accept_uniform: Tensor
    accept_strides: tuple[int, ...]
    next_uniform: Tensor
    next_stride: int
    offsets: Tensor | None
    slots: int
    vocab: int
    chunks: int
    chunk_largest: Tensor  # float32 [rows, positions, chunks]
    chunk_total: Tensor  # float32 [rows, positions, chunks], sum of exp(logit - largest)
    chunk_best: Tensor  # int32 [rows, positions, chunks], index of the first largest logit
    largest: Tensor  # the same of all chunks together, [rows, positions]
    total: Tensor
    best: Tensor
    survival: Tensor | None  # float64 [rows, positions], p_0 to p_slots of block verification
    surplus: Tensor | None  # float64 [rows, positions, chunks]
    masses: Tensor  # float64 [rows, 2, chunks], of the residual and of the target
    accepted: Tensor  # long [rows]
    next_token: Tensor  # long [rows]


def verify_logits(
    rule: str,
    tokens: Tensor,
    draft: Tensor,
    target_logits: Tensor,
    temperatures: Tensor,
    lengths: Tensor | None,
    accept_uniform: Tensor,
    next_uniform: Tensor,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same as `rejection.verify_logits`: the number of tokens kept and the next one of each row."""
    (rows, slots), vocab = tokens.shape, target_logits.shape[1]
    positions, chunk = slots + 1, min(CHUNK, triton.next_power_of_2(vocab))
    chunks = triton.cdiv(vocab, chunk)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=tokens.device)

    is_block = rule == "block"
    batch = Batch(
        tokens,
        tokens.stride(),
        draft,
        draft.stride()[:2],
        target_logits,
        target_logits.stride(0),
        temperatures,
        lengths,
        accept_uniform,
        accept_uniform.stride(),
        next_uniform,
        next_uniform.stride(0),
        offsets,
        slots,
        vocab,
        chunks,
        chunk_largest=empty(rows, positions, chunks, dtype=torch.float32),
        chunk_total=empty(rows, positions, chunks, dtype=torch.float32),
        chunk_best=empty(rows, positions, chunks, dtype=torch.int32),
        largest=empty(rows, positions, dtype=torch.float32),
        total=empty(rows, positions, dtype=torch.float32),
        best=empty(rows, positions, dtype=torch.int32),
        survival=empty(rows, positions, dtype=torch.float64) if is_block else None,
        surplus=empty(rows, positions, chunks, dtype=torch.float64) if is_block else None,
        masses=empty(rows, 2, chunks, dtype=torch.float64),
        accepted=empty(rows, dtype=torch.long),
        next_token=empty(rows, dtype=torch.long),
    )
    powers = {"POSITIONS": triton.next_power_of_2(positions), "CHUNKS": triton.next_power_of_2(chunks)}
    of_chunk: dict[str, Any] = {"CHUNK": chunk, "num_warps": 8}
    with torch.cuda.device_of(tokens):
        _statistics_of_chunk[(rows * positions, chunks)](batch, **of_chunk)
        _judge[(rows,)](batch, **powers)
        if is_block:
            _surplus_of_chunk[(rows * positions, chunks)](batch, **of_chunk)
            _judge_block[(rows,)](batch, **powers)
        _masses_of_chunk[(rows, chunks)](batch, **of_chunk)
        _draw_next[(rows,)](batch, CHUNKS=powers["CHUNKS"], **of_chunk)
    return batch.accepted, batch.next_token


@triton.jit
def _statistics_of_chunk(batch, CHUNK: tl.constexpr):
    """One chunk of one position per program; nothing for positions after the last proposed token's."""
    position, chunk = tl.program_id(0), tl.program_id(1)
    row, slot = position // (batch.slots + 1), position % (batch.slots + 1)
    if slot <= _length(batch, row):
        z = _scaled_logits(batch, row, slot, chunk * CHUNK + tl.arange(0, CHUNK))
        top, place = tl.max(tl.where(z == z, z, -float("inf")), 0, return_indices=True)  # z == z: not NaN
        finite_top = tl.where(top == -float("inf"), 0.0, top)
        statistic = position * batch.chunks + chunk
        tl.store(batch.chunk_largest + statistic, top)
        tl.store(batch.chunk_total + statistic, tl.sum(tl.exp(z - finite_top)))
        tl.store(batch.chunk_best + statistic, chunk * CHUNK + place)


@triton.jit
def _judge(batch, POSITIONS: tl.constexpr, CHUNKS: tl.constexpr):
    """One row per program: statistics of its positions; the number of tokens kept or, of blocks, p_0 to p_slots."""
    row = tl.program_id(0)
    slot, chunk = tl.arange(0, POSITIONS), tl.arange(0, CHUNKS)
    length = _length(batch, row)
    position = row * (batch.slots + 1) + slot
    known = (slot <= length)[:, None] & (chunk < batch.chunks)[None, :]
    statistic = position[:, None] * batch.chunks + chunk[None, :]
    tops = tl.load(batch.chunk_largest + statistic, mask=known, other=-float("inf"))
    totals = tl.load(batch.chunk_total + statistic, mask=known, other=0.0)
    places = tl.load(batch.chunk_best + statistic, mask=known, other=0)
    largest = tl.max(tops, 1)
    total = tl.sum(tl.where(known, totals * tl.exp(tops - largest[:, None]), 0.0), 1)
    best = tl.min(tl.where(known & (tops == largest[:, None]), places, batch.vocab - 1), 1)
    tl.store(batch.largest + position, largest, mask=slot <= length)
    tl.store(batch.total + position, total, mask=slot <= length)
    tl.store(batch.best + position, best, mask=slot <= length)

    proposed = slot < length
    token = tl.load(
        batch.tokens + row * batch.tokens_strides[0] + slot * batch.tokens_strides[1], mask=proposed, other=batch.vocab
    )
    of_target = _probability(batch, row, slot, token, largest, total, best)
    of_draft = tl.load(_draft_places(batch, row, slot, token), mask=proposed, other=1.0).to(tl.float64)
    if batch.survival is None:
        places = row * batch.accept_strides[0] + slot * batch.accept_strides[1]
        uniform = tl.load(batch.accept_uniform + places, mask=proposed, other=0.0)
        keep = proposed & (uniform * of_draft < of_target)
        tl.store(batch.accepted + row, tl.min(tl.where(keep, POSITIONS, slot)).to(tl.int64))
    else:
        ratio = of_target / of_draft
        kept = tl.full([], 1.0, tl.float64)
        survival = tl.full([POSITIONS], 1.0, tl.float64)
        for index in range(batch.slots):
            kept = tl.minimum(kept * tl.sum(tl.where(slot == index, ratio, 0.0)), 1.0)
            survival = tl.where(slot == index + 1, kept, survival)
        tl.store(batch.survival + position, survival, mask=slot <= length)


@triton.jit
def _surplus_of_chunk(batch, CHUNK: tl.constexpr):
    """One chunk of one position per program: sum of max(p_i p_t - p_d, 0) at the token after the first i."""
    position, chunk = tl.program_id(0), tl.program_id(1)
    row, slot = position // (batch.slots + 1), position % (batch.slots + 1)
    if slot < _length(batch, row):
        residual, _ = _weights(batch, row, slot, chunk * CHUNK + tl.arange(0, CHUNK))
        tl.store(batch.surplus + position * batch.chunks + chunk, tl.sum(residual))


@triton.jit
def _judge_block(batch, POSITIONS: tl.constexpr, CHUNKS: tl.constexpr):
    """One row per program: the largest number of tokens whose test passes."""
    row = tl.program_id(0)
    count, chunk = tl.arange(0, POSITIONS), tl.arange(0, CHUNKS)
    length = _length(batch, row)
    position = row * (batch.slots + 1) + count
    surplus = tl.load(
        batch.surplus + position[:, None] * batch.chunks + chunk[None, :],
        mask=(count < length)[:, None] & (chunk < batch.chunks)[None, :],
        other=0.0,
    )
    extra = tl.sum(surplus, 1)
    survival = tl.load(batch.survival + position, mask=count <= length, other=0.0)
    whole = extra + 1 - survival
    stopping = tl.where(whole > 0, extra / tl.where(whole > 0, whole, 1.0), 0.0)
    tested = (count > 0) & (count <= length)
    places = row * batch.accept_strides[0] + (count - 1) * batch.accept_strides[1]
    uniform = tl.load(batch.accept_uniform + places, mask=tested, other=1.0)
    passes = tested & (uniform < tl.where(count == length, survival, stopping))
    tl.store(batch.accepted + row, tl.max(tl.where(passes, count, 0)).to(tl.int64))


@triton.jit
def _masses_of_chunk(batch, CHUNK: tl.constexpr):
    """One chunk of one row per program: sums of both weights at the first token not kept."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    slot = tl.load(batch.accepted + row).to(tl.int32)
    residual, of_target = _weights(batch, row, slot, chunk * CHUNK + tl.arange(0, CHUNK))
    tl.store(batch.masses + 2 * row * batch.chunks + chunk, tl.sum(residual))
    tl.store(batch.masses + (2 * row + 1) * batch.chunks + chunk, tl.sum(of_target))


@triton.jit
def _draw_next(batch, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """One row per program."""
    row, index = tl.program_id(0), tl.arange(0, CHUNKS)
    slot = tl.load(batch.accepted + row).to(tl.int32)
    places = batch.masses + 2 * row * batch.chunks + index
    of_residual = tl.load(places, mask=index < batch.chunks, other=0.0)
    of_target = tl.load(places + batch.chunks, mask=index < batch.chunks, other=0.0)
    # A residual of nothing after a rejection means equal distributions: rounding alone rejected, and p_t is right.
    has_residual = tl.sum(of_residual) > 0
    uniform = tl.load(batch.next_uniform + row * batch.next_stride)
    chunk, threshold = choose_chunk(tl.where(has_residual, of_residual, of_target), uniform)
    residual, target = _weights(batch, row, slot, chunk * CHUNK + tl.arange(0, CHUNK))
    place = first_above(tl.where(has_residual, residual, target), threshold)
    tl.store(batch.next_token + row, (chunk * CHUNK + place).to(tl.int64))


@triton.jit
def _length(batch, row):
    """How many tokens of the row are proposed."""
    if batch.lengths is None:
        return batch.slots
    else:
        return tl.load(batch.lengths + row).to(tl.int32)


@triton.jit
def _weights(batch, row, slot, column):
    """float64 max(scale * p_t - p_d, 0), 0 if no token is proposed here, and p_t; 0 beyond the vocabulary."""
    position = row * (batch.slots + 1) + slot
    largest, total = tl.load(batch.largest + position), tl.load(batch.total + position)
    of_target = _probability(batch, row, slot, column, largest, total, tl.load(batch.best + position))
    scaled = of_target if batch.survival is None else tl.load(batch.survival + position) * of_target
    drafted = tl.where(slot < _length(batch, row), batch.vocab, 0)
    of_draft = tl.load(_draft_places(batch, row, slot, column), mask=column < drafted, other=0.0).to(tl.float64)
    return tl.where((column < drafted) & (scaled > of_draft), scaled - of_draft, 0.0), of_target


@triton.jit
def _draft_places(batch, row, slot, column):
    wide_row, wide_slot = tl.cast(row, tl.int64), tl.cast(slot, tl.int64)  # can pass 2**31 elements
    return batch.draft + wide_row * batch.draft_strides[0] + wide_slot * batch.draft_strides[1] + column


@triton.jit
def _probability(batch, row, slot, column, largest, total, best):
    """The target's, in float64 but rounded to float32; 0 beyond the vocabulary."""
    z = _scaled_logits(batch, row, slot, column)
    is_greedy = tl.load(batch.temperatures + row) == 0
    probability = tl.where(is_greedy, tl.where(column == best, 1.0, 0.0), tl.exp(z - largest) / total)
    return tl.where(column < batch.vocab, probability, 0.0).to(tl.float64)


@triton.jit
def _scaled_logits(batch, row, slot, column):
    """Logits / temperature in float32, or logits at temperature 0; -inf beyond the vocabulary."""
    if batch.offsets is None:
        first = tl.cast(row, tl.int64) * (batch.slots + 1)
    else:
        first = tl.load(batch.offsets + row).to(tl.int64)
    places = batch.logits + (first + slot) * batch.logits_stride + column
    z = tl.load(places, mask=column < batch.vocab, other=-float("inf")).to(tl.float32)
    temperature = tl.load(batch.temperatures + row)
    return z / tl.where(temperature == 0, 1.0, temperature)
