"""The step of a sequential head in three Triton kernels, or two where all rows take their largest logit.

1. One program per block of the vocabulary holds its rows of W2 and goes over the rows of the batch, so that W2 is read
   once: logits, and the largest, its index and the sum of exponentials of each block.
2. Logits become probabilities, and each chunk of them gets its mass in float64.
3. One program per row chooses the chunk by the masses, then the token in it.

No result of a row depends on how many rows there are: tiles have the same shapes for every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepspec.kernels.inversion_triton import CHUNK, choose_chunk, first_above

ROWS = 16  # of a tile, the least that tensor cores take
TABLE_ELEMENTS = {2: 2**15, 4: 2**13}  # of W2 that a program holds, by the bytes of one in the product
MAX_COLUMNS = 256


def draw_biased(
    base: Tensor, latents: Tensor, markov_w2: Tensor, temperatures: Tensor, uniform: Tensor, out: Tensor
) -> Tensor:
    """The same as `biased_sampling.draw_biased`: fills `out` and returns the tokens."""
    rows, vocab = base.shape
    with torch.cuda.device_of(base):
        statistics = _logits_and_statistics(base, latents, markov_w2, temperatures, out)
        blocks = statistics[0].shape[1]
        chunk = min(CHUNK, triton.next_power_of_2(vocab))
        chunks = triton.cdiv(vocab, chunk)
        masses = base.new_empty(rows, chunks, dtype=torch.float64)
        _normalise[(rows, chunks)](
            out,
            out.stride(0),
            temperatures,
            *statistics,
            masses,
            vocab,
            blocks,
            chunks,
            BLOCKS=triton.next_power_of_2(blocks),
            CHUNK=chunk,
            num_warps=8,
        )
        tokens = base.new_empty(rows, dtype=torch.long)
        _draw[(rows,)](
            out,
            out.stride(0),
            uniform,
            uniform.stride(0),
            masses,
            tokens,
            vocab,
            chunks,
            CHUNKS=triton.next_power_of_2(chunks),
            CHUNK=chunk,
            num_warps=8,
        )
    return tokens


def argmax_biased(base: Tensor, latents: Tensor, markov_w2: Tensor) -> Tensor:
    """The same as `biased_sampling.argmax_biased`."""
    rows, vocab = base.shape
    with torch.cuda.device_of(base):
        largest, _, best = _logits_and_statistics(base, latents, markov_w2, None, None)
        blocks = largest.shape[1]
        tokens = base.new_empty(rows, dtype=torch.long)
        _argmax[(rows,)](largest, best, tokens, vocab, blocks, BLOCKS=triton.next_power_of_2(blocks))
    return tokens


def _logits_and_statistics(
    base: Tensor, latents: Tensor, markov_w2: Tensor, temperatures: Tensor | None, logits: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of each block, the sum of exp(logit - largest) and the index of the largest, each [rows, blocks].

    Logits divided by temperature go to `logits`. Without temperatures there are neither logits nor sums.
    """
    rows, vocab = base.shape
    rank = triton.next_power_of_2(markov_w2.shape[1])
    product = _product_dtype(latents, markov_w2)
    columns = max(16, min(MAX_COLUMNS, triton.next_power_of_2(vocab), TABLE_ELEMENTS[product.itemsize] // rank))
    blocks = triton.cdiv(vocab, columns)
    largest, total = base.new_empty(2, rows, blocks, dtype=torch.float32)
    best = base.new_empty(rows, blocks, dtype=torch.int32)
    _logits_of_block[(blocks,)](
        base,
        base.stride(0),
        latents,
        latents.stride(0),
        markov_w2,
        largest if temperatures is None else temperatures,
        largest if logits is None else logits,
        0 if logits is None else logits.stride(0),
        largest,
        total,
        best,
        rows,
        vocab,
        markov_w2.shape[1],
        blocks,
        IS_DRAWN=temperatures is not None,
        PRODUCT=TRITON_DTYPES[product],
        ROWS=ROWS,
        COLUMNS=columns,
        RANK=max(16, rank),
    )
    return largest, total, best


TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _product_dtype(latents: Tensor, markov_w2: Tensor) -> torch.dtype:
    """Of the operands: 16 bits if both have them (the interpreter cannot multiply bf16), else float32."""
    can_multiply = latents.dtype == markov_w2.dtype and not triton.knobs.runtime.interpret
    return markov_w2.dtype if can_multiply else torch.float32


@triton.jit
def _logits_of_block(
    base,
    base_stride,
    latents,
    latents_stride,
    markov_w2,
    temperatures,
    logits,
    logits_stride,
    largest,
    total,
    best,
    rows,
    vocab,
    rank,
    blocks,
    IS_DRAWN: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """One block of the vocabulary per program, all rows."""
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    feature = tl.arange(0, RANK)
    has_feature = (feature < rank)[None, :]
    table = tl.load(
        markov_w2 + column.to(tl.int64)[:, None] * rank + feature[None, :],
        mask=(column < vocab)[:, None] & has_feature,
        other=0.0,
    ).to(PRODUCT)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < rows
        wide_row = row.to(tl.int64)[:, None]
        latent = tl.load(
            latents + wide_row * latents_stride + feature[None, :], mask=is_row[:, None] & has_feature, other=0.0
        ).to(PRODUCT)
        inside = is_row[:, None] & (column < vocab)[None, :]
        unbiased = tl.load(base + wide_row * base_stride + column[None, :], mask=inside, other=0.0)
        z = tl.dot(latent, tl.trans(table), input_precision="tf32x3") + unbiased.to(tl.float32)
        if IS_DRAWN:
            temperature = tl.load(temperatures + row, mask=is_row, other=1.0)
            z = z / tl.where(temperature == 0, 1.0, temperature)[:, None]
            tl.store(logits + wide_row * logits_stride + column[None, :], z, mask=inside)
        ranked = tl.where((column < vocab)[None, :] & (z == z), z, -float("inf"))  # z == z: not NaN
        top, place = tl.max(ranked, 1, return_indices=True)
        statistic = row * blocks + block
        tl.store(largest + statistic, top, mask=is_row)
        tl.store(best + statistic, block * COLUMNS + place, mask=is_row)
        if IS_DRAWN:
            finite_top = tl.where(top == -float("inf"), 0.0, top)
            exponential = tl.where((column < vocab)[None, :], tl.exp(z - finite_top[:, None]), 0.0)
            tl.store(total + statistic, tl.sum(exponential, 1), mask=is_row)


@triton.jit
def _normalise(
    logits,
    logits_stride,
    temperatures,
    largest,
    total,
    best,
    masses,
    vocab,
    blocks,
    chunks,
    BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one row per program: logits become probabilities in place."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    block = tl.arange(0, BLOCKS)
    statistic = row * blocks + block
    tops = tl.load(largest + statistic, mask=block < blocks, other=-float("inf"))
    totals = tl.load(total + statistic, mask=block < blocks, other=0.0)
    top = tl.max(tops)
    whole = tl.sum(tl.where(block < blocks, totals * tl.exp(tops - top), 0.0))
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    place = logits + row.to(tl.int64) * logits_stride + column
    probability = tl.exp(tl.load(place, mask=column < vocab, other=0.0) - top) / whole
    if tl.load(temperatures + row) == 0:
        places = tl.load(best + statistic, mask=block < blocks, other=0)
        first = tl.min(tl.where((block < blocks) & (tops == top), places, vocab - 1))
        probability = tl.where(column == first, 1.0, 0.0)
    tl.store(place, probability, mask=column < vocab)
    tl.store(masses + row * chunks + chunk, tl.sum(tl.where(column < vocab, probability, 0.0).to(tl.float64)))


@triton.jit
def _draw(
    distribution,
    distribution_stride,
    uniform,
    uniform_stride,
    masses,
    tokens,
    vocab,
    chunks,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0)
    index = tl.arange(0, CHUNKS)
    mass = tl.load(masses + row * chunks + index, mask=index < chunks, other=0.0)
    chunk, threshold = choose_chunk(mass, tl.load(uniform + row.to(tl.int64) * uniform_stride))
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    place = distribution + row.to(tl.int64) * distribution_stride + column
    weight = tl.load(place, mask=column < vocab, other=0.0).to(tl.float64)
    tl.store(tokens + row, (chunk * CHUNK + first_above(weight, threshold)).to(tl.int64))


@triton.jit
def _argmax(largest, best, tokens, vocab, blocks, BLOCKS: tl.constexpr):
    """One row per program: the first of the largest logits."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    tops = tl.load(largest + row * blocks + block, mask=block < blocks, other=-float("inf"))
    places = tl.load(best + row * blocks + block, mask=block < blocks, other=0)
    first = tl.min(tl.where((block < blocks) & (tops == tl.max(tops)), places, vocab - 1))
    tl.store(tokens + row, first.to(tl.int64))
