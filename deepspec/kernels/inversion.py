"""From logits to a distribution, and a draw from exactly that distribution by inverting its cumulative sum."""

from __future__ import annotations

import torch
from torch import Tensor


def distribution_of(logits: Tensor, temperatures: Tensor) -> Tensor:
    """softmax(logits / temperature) in float32; at temperature 0 the one-hot of the largest logit, the first of equals.

    Args:
        logits: [rows, ..., vocab]
        temperatures: float32 [rows]
    """
    logits = logits.float()
    temperature = temperatures.view(-1, *[1] * (logits.ndim - 1))
    greedy = temperature == 0
    softmax = torch.softmax(logits / temperature.masked_fill(greedy, 1.0), dim=-1)
    one_hot = torch.zeros_like(softmax).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    return torch.where(greedy, one_hot, softmax)


def sample(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative weight, summed in float64, is above uniform * total.

    Args:
        weights: [..., vocab], not negative, of any sum.
        uniform: float64 [...], from 0 to below 1.

    Returns:
        Token ids [...]; a token of weight 0 is never drawn.
    """
    cumulative = torch.cumsum(weights, -1, dtype=torch.float64)
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp_(max=weights.shape[-1] - 1)  # out of range only if the weights were not finite
