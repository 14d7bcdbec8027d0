"""From logits to the distribution that is sampled from, and sampling from exactly that distribution.

Draft and target pass through the same functions, so the acceptance test compares the very probabilities that drew the
token. Temperature 0 is the one-hot distribution of the largest logit. A batch of greedy rows alone takes the argmax
instead and never writes the distribution down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_UNIFORM = 1 - 2.0**-52  # so that uniform * total is below total in float64 for every total
SMALLEST_TEMPERATURE = 1e-30  # keeps logits / temperature finite


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the rows of a batch, as tensors that broadcast over [rows, tokens, vocab]."""

    temperature: Tensor  # [rows, 1, 1], 1 where greedy
    greedy: Tensor  # bool [rows, 1, 1]
    top_k: Tensor  # long [rows, 1, 1], the vocabulary size where off
    top_p: Tensor  # [rows, 1, 1], 1 where off
    truncated: Tensor  # bool [rows, 1, 1], where top-k or top-p is on
    all_greedy: bool
    any_greedy: bool
    any_scaled: bool
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
        """Args: one temperature (0 = greedy), top-k (0 = off) and top-p (1 = off) per row."""

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)

        sampled = [t > 0 for t in temperatures]
        truncated = [s and bool(k or p < 1) for s, k, p in zip(sampled, top_ks, top_ps, strict=True)]
        return cls(
            temperature=column([max(t, SMALLEST_TEMPERATURE) if t > 0 else 1.0 for t in temperatures], torch.float32),
            greedy=column([not s for s in sampled], torch.bool),
            top_k=column([min(k, vocab) or vocab for k in top_ks], torch.long),
            top_p=column(top_ps, torch.float32),
            truncated=column(truncated, torch.bool),
            all_greedy=not any(sampled),
            any_greedy=not all(sampled),
            any_scaled=any(t not in (0.0, 1.0) for t in temperatures),
            any_truncated=any(truncated),
        )


def probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Distribution after temperature, then top-k, then top-p, in float32: [rows, tokens, vocab] -> same shape.

    Top-p keeps the smallest set of most likely tokens whose mass reaches p. Ties at the border of either are kept.
    """
    logits = logits.float()
    result = torch.softmax(logits / settings.temperature if settings.any_scaled else logits, dim=-1)
    if settings.any_truncated:
        result = torch.where(settings.truncated, _truncate(result, settings), result)
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
        uniform: float64 [...], in [0, LARGEST_UNIFORM].

    Returns:
        Token ids [...]; a token of weight 0 is never drawn.
    """
    cumulative = torch.cumsum(weights, -1, dtype=torch.float64)
    threshold = uniform.unsqueeze(-1) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return drawn.clamp_(max=weights.shape[-1] - 1)  # out of range only if the weights were not finite


def draw(logits: Tensor, settings: SamplingSettings, uniform: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Draw one token per row and position.

    Args:
        logits: [rows, tokens, vocab]
        uniform: float64 [rows, tokens]; not needed when every row is greedy.

    Returns:
        Token ids [rows, tokens] and the distributions that they were drawn from; None when every row is greedy.
    """
    if settings.all_greedy:
        return logits.argmax(-1), None
    assert uniform is not None
    distribution = probabilities(logits, settings)
    return sample(distribution, uniform), distribution


class UniformStream:
    """Uniform numbers of one request: its own stream, so its tokens do not depend on what else is in the batch."""

    DRAWS_AT_ONCE = 32

    def __init__(self, seed: int, count: int):
        """Args: `count` numbers are handed out at a time."""
        self._generator = torch.Generator().manual_seed(seed)
        self._shape = (self.DRAWS_AT_ONCE, count)
        self._drawn: list[Tensor] = []

    def draw(self) -> Tensor:
        """float64 [count], in [0, LARGEST_UNIFORM]"""
        if not self._drawn:
            block = torch.rand(self._shape, generator=self._generator, dtype=torch.float64)
            self._drawn = list(block.clamp_(max=LARGEST_UNIFORM).unbind())
        return self._drawn.pop()
