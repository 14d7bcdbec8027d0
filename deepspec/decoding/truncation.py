"""Top-k, top-p and min-p without sorting the vocabulary.

Each keeps the tokens from some probability up, so together they are one border. It is looked for among a few of the
likeliest tokens, then among more for rows where these do not tell; the whole vocabulary always does. Which rows these
are is for the host to see. A GPU, whose graphs cannot wait for the host, sorts the whole vocabulary at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.kernels.inversion import sample

FEW = 128  # likeliest tokens that are looked at first
MORE = 16  # times as many where these do not tell


class Limits(NamedTuple):
    """What is kept, by row."""

    top_k: Tensor  # long [n, 1], the vocabulary size where off
    top_p: Tensor  # [n, 1], infinite where off
    min_p: Tensor  # [n, 1], 0 where off

    def of_rows(self, rows: Tensor) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def smallest_kept(weights: Tensor, limits: Limits, is_wanted: Tensor, count: int = FEW) -> Tensor:
    """The smallest probability that is kept, found among `count` tokens or more.

    Args:
        weights: [n, vocab], probabilities.
        is_wanted: bool [n, 1]; of other rows the result has no meaning.

    Returns:
        [n, 1]
    """
    values, _ = _likeliest(weights, count)
    border, is_found = _border(weights, values, limits)
    if values.shape[1] < weights.shape[1]:
        rows = (is_wanted & ~is_found).flatten().nonzero().flatten()
        if len(rows):
            border[rows] = smallest_kept(weights[rows], limits.of_rows(rows), is_wanted[rows], MORE * count)
    return border


def draw_kept(weights: Tensor, limits: Limits, uniform: Tensor, count: int = FEW) -> Tensor:
    """Draw a token of each row from what is kept: the one that `sample` draws where all else is zero.

    Args:
        weights: [n, vocab], probabilities.
        uniform: float64 [n]

    Returns:
        Token ids [n].
    """
    values, ids = _likeliest(weights, count)
    border, is_found = _border(weights, values, limits)
    ids, order = ids.sort(-1)
    drawn = sample(values.masked_fill(values < border, 0.0).gather(1, order), uniform)
    tokens = ids.gather(1, drawn[:, None])[:, 0]
    if values.shape[1] < weights.shape[1]:
        rows = (~is_found).flatten().nonzero().flatten()
        if len(rows):
            tokens[rows] = draw_kept(weights[rows], limits.of_rows(rows), uniform[rows], MORE * count)
    return tokens


def _likeliest(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens' probabilities, the largest first, and their ids, each [n, count] or [n, vocab]."""
    if weights.device.type != "cpu" or 4 * count > weights.shape[1]:
        values, ids = weights.sort(-1, descending=True)
    else:
        values, ids = weights.topk(count)
    return values, ids


def _border(weights: Tensor, values: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """The smallest kept probability as the likeliest tokens have it, [n, 1], and whether that is the true one."""
    last, has_no_k = values[:, -1:], limits.top_k >= weights.shape[1]
    kth = values.gather(1, limits.top_k.clamp(max=values.shape[1]) - 1).masked_fill(has_no_k, 0.0)
    values = values.masked_fill(values < kth, 0.0)
    total = torch.where(has_no_k, weights.sum(1, keepdim=True), values.sum(1, keepdim=True))
    outside = values.cumsum(1) - values >= limits.top_p * total
    border = values.masked_fill(outside | (values == 0), torch.inf).amin(1, keepdim=True)
    border = border.maximum(limits.min_p * values[:, :1])
    # Equals of the last one may lie behind it; behind a zero is nothing more.
    is_found = (last == 0) | ((has_no_k | (kth > last)) & (border > last))
    return border, is_found
