"""Parts of kernels that draw from weights over the vocabulary: choose a chunk by its mass, then a token in it."""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 4096  # tokens whose weights one program holds


@triton.jit
def choose_chunk(masses, uniform):
    """The chunk that holds the token of cumulative weight uniform * total, and how much of that weight is its own.

    Args:
        masses: float64 [a power of two], 0 beyond the last chunk.
        uniform: float64 scalar, from 0 to below 1.
    """
    threshold = uniform * tl.sum(masses)
    chosen = first_above(masses, threshold)
    before = tl.sum(tl.where(tl.arange(0, masses.shape[0]) < chosen, masses, 0.0))
    return chosen, threshold - before


@triton.jit
def first_above(weights, threshold):
    """Index of the first positive weight at which the cumulative sum is above `threshold`.

    If rounding leaves none the last positive weight, so that one of 0 is never drawn. A parallel sum need not rise
    where a weight is 0, hence the search among positive weights only. 0 if none is positive, as of NaN.
    """
    index = tl.arange(0, weights.shape[0])
    positive = weights > 0
    above = positive & (tl.cumsum(weights, 0) > threshold)
    last = tl.max(tl.where(positive, index, 0))
    return tl.minimum(last, tl.min(tl.where(above, index, weights.shape[0])))
