"""From logits to the distribution that is sampled from, and sampling from exactly that distribution.

Draft and target pass through the same functions, so the acceptance test compares the very probabilities that drew the
token. Temperature 0 is the one-hot distribution of the largest logit; greedy decoding needs no code of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the rows of a batch, as tensors that broadcast over [rows, tokens, vocab]."""

    temperature: Tensor  # [rows, 1, 1], 1 where greedy
    greedy: Tensor  # bool [rows, 1, 1]
    top_k: Tensor  # long [rows, 1, 1], the vocabulary size where off
    top_p: Tensor  # [rows, 1, 1], 1 where off
    any_greedy: bool
    any_truncated: bool

    @classmethod
    def of_rows(
        cls,
        temperatures: Sequence[float],
        top_ks: Sequence[int],
        top_ps: Sequence[float],
        vocab: int,
        device: torch.device,
    ) -> SamplingSettings:
        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)

        return cls(
            temperature=column([t or 1.0 for t in temperatures], torch.float32),
            greedy=column([t == 0 for t in temperatures], torch.bool),
            top_k=column([min(k, vocab) or vocab for k in top_ks], torch.long),
            top_p=column(top_ps, torch.float32),
            any_greedy=0 in temperatures,
            any_truncated=any(top_ks) or any(p < 1 for p in top_ps),
        )


def probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Distribution after temperature, then top-k, then top-p, in float32: [rows, tokens, vocab] -> same shape.

    Ties at the top-k border are kept; top-p keeps the smallest set of most likely tokens whose mass reaches p.
    """
    logits = logits.float()
    result = torch.softmax(logits / settings.temperature, dim=-1)
    if settings.any_truncated:
        result = _truncate(result, settings)
    if settings.any_greedy:
        one_hot = torch.zeros_like(result).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        result = torch.where(settings.greedy, one_hot, result)
    return result


def _truncate(result: Tensor, settings: SamplingSettings) -> Tensor:
    ordered = result.sort(dim=-1, descending=True).values
    kth = ordered.gather(-1, (settings.top_k - 1).expand(*result.shape[:-1], 1))
    ordered = ordered.masked_fill(ordered < kth, 0.0)
    mass_before = ordered.cumsum(-1) - ordered
    outside = mass_before >= settings.top_p * ordered.sum(-1, keepdim=True)
    smallest_kept = ordered.masked_fill(outside | (ordered == 0), torch.inf).amin(-1, keepdim=True)
    kept = result.masked_fill(result < smallest_kept, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def sample(weights: Tensor, uniform: Tensor) -> Tensor:
    """Draw from unnormalised non-negative weights by inverting their cumulative sum, in float64.

    Args:
        weights: [..., vocab]
        uniform: float64 [...], in [0, 1)

    Returns:
        Token ids [...]; a token of weight 0 is never drawn.
    """
    cumulative = weights.double().cumsum(-1)
    threshold = (uniform * cumulative[..., -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp_(max=weights.shape[-1] - 1)


class UniformStream:
    """Uniform numbers of one request: its own stream, so its tokens do not depend on what else is in the batch."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """float64 [count], in [0, 1)"""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)
