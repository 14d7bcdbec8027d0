"""What `losses` does between its matrix products, in one Triton kernel (DSpark section 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # columns that one program holds at a time
WARPS = 8


def losses_of_rows(
    logits: Tensor,
    target_logits: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
    ce: Tensor,
    l1: Tensor,
    gradient: Tensor | None,
) -> None:
    """The same as `losses.losses_of_rows`; reads each logit three times and writes each gradient once."""
    rows, vocab = logits.shape
    with torch.cuda.device_of(logits):
        _losses_of_row[(rows,)](
            logits,
            logits if target_logits is None else target_logits,
            targets,
            weights,
            ce,
            l1,
            logits if gradient is None else gradient,
            vocab,
            float(ce_scale),
            float(tv_scale),
            HAS_TARGET=target_logits is not None,
            HAS_TV=tv_scale != 0,
            HAS_GRADIENT=gradient is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
            num_warps=WARPS,
        )


def soft_cap_(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in place, of a tensor without gaps."""
    size = logits.numel()
    with torch.cuda.device_of(logits):
        _cap[(triton.cdiv(size, BLOCK),)](logits, float(cap), size, BLOCK=BLOCK, num_warps=WARPS)
    return logits


def multiply_by_slope(gradient: Tensor, logits: Tensor, cap: float) -> None:
    """The same as `losses.multiply_by_slope`, of tensors without gaps; leaves `logits` as they are."""
    size = logits.numel()
    with torch.cuda.device_of(logits):
        _multiply_by_slope[(triton.cdiv(size, BLOCK),)](
            gradient, logits, float(cap), size, BLOCK=BLOCK, num_warps=WARPS
        )


@triton.jit
def _losses_of_row(
    logits,
    target_logits,
    targets,
    weights,
    ce,
    l1,
    gradient,
    vocab,
    ce_scale,
    tv_scale,
    HAS_TARGET: tl.constexpr,
    HAS_TV: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program; all matrices are [rows, vocab] without gaps. `gradient` may be `logits`."""
    row = tl.program_id(0)
    first = row.to(tl.int64) * vocab  # rows * vocab can pass 2**31
    logits += first
    target_logits += first
    gradient += first
    target = tl.load(targets + row)
    has_ce = target >= 0
    target_logit = tl.load(logits + target, mask=has_ce, other=0.0)

    largest, total = -float("inf"), 0.0
    target_largest, target_total = -float("inf"), 0.0
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, mask=columns < vocab, other=-float("inf"))
        largest, total = _add_exponentials(z, largest, total)
        if HAS_TARGET:
            z = tl.load(target_logits + columns, mask=columns < vocab, other=-float("inf"))
            target_largest, target_total = _add_exponentials(z, target_largest, target_total)
    tl.store(ce + row, tl.where(has_ce, largest - target_logit + tl.log(total), 0.0))

    mean_sign = 0.0
    if HAS_TARGET:
        distances = tl.zeros([BLOCK], tl.float32)
        signed_p = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            p = _probabilities(logits, columns, vocab, largest, total)
            difference = p - _probabilities(target_logits, columns, vocab, target_largest, target_total)
            distances += tl.abs(difference)
            signed_p += _sign(difference) * p
        tl.store(l1 + row, tl.sum(distances))
        mean_sign = tl.sum(signed_p)

    if HAS_GRADIENT:
        weight = tl.load(weights + row)
        ce_scale = tl.where(has_ce, ce_scale, 0.0)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            p = _probabilities(logits, columns, vocab, largest, total)
            slope = ce_scale * (p - tl.where(columns == target, 1.0, 0.0))
            if HAS_TV:
                q = _probabilities(target_logits, columns, vocab, target_largest, target_total)
                slope += tv_scale * p * (_sign(p - q) - mean_sign)
            tl.store(gradient + columns, (weight * slope).to(gradient.dtype.element_ty), mask=columns < vocab)


@triton.jit
def _add_exponentials(z, largest, total):
    """The largest value so far, and the sum of exp(value - largest), after the values `z`."""
    new_largest = tl.maximum(largest, tl.max(z))
    return new_largest, total * tl.exp(largest - new_largest) + tl.sum(tl.exp(z - new_largest))


@triton.jit
def _probabilities(logits, columns, vocab, largest, total):
    """Zero beyond the vocabulary."""
    z = tl.load(logits + columns, mask=columns < vocab, other=-float("inf"))
    return tl.exp(z - largest) / total


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def _cap(logits, cap, elements, BLOCK: tl.constexpr):
    """One block per program."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # elements can pass 2**31
    z = tl.load(logits + place, mask=place < elements, other=0.0)
    tl.store(logits + place, cap * _tanh(z / cap), mask=place < elements)


@triton.jit
def _multiply_by_slope(gradient, logits, cap, elements, BLOCK: tl.constexpr):
    """One block per program."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    capped = _tanh(tl.load(logits + place, mask=place < elements, other=0.0) / cap)
    slope = tl.load(gradient + place, mask=place < elements, other=0.0).to(tl.float32) * (1 - capped * capped)
    tl.store(gradient + place, slope.to(gradient.dtype.element_ty), mask=place < elements)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1
