"""From logits to the distribution that is sampled from, and sampling from exactly that distribution.

The order is that of Transformers' `generate`: repetition penalty (`deepspec.decoding.penalties`, on the logits, before
they come here), temperature, top-k, top-p, min-p; each step renormalises what the one before it has kept.
Draft and target pass through the same functions, so the acceptance test compares the very probabilities that drew the
token. Temperature 0 is the one-hot distribution of the largest logit. A batch of greedy rows alone takes the argmax
instead and never writes the distribution down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from deepspec.decoding.penalties import RepetitionPenalty
from deepspec.decoding.requests import Request
from deepspec.decoding.truncation import Limits, draw_kept, smallest_kept
from deepspec.kernels.inversion import sample

LARGEST_UNIFORM = 1 - 2.0**-52  # so that uniform * total is below total in float64 for every total
SMALLEST_TEMPERATURE = 1e-30  # keeps logits / temperature finite


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the rows of a batch, as tensors that broadcast over [rows, tokens, vocab]."""

    temperature: Tensor  # [rows, 1, 1], 1 where greedy
    greedy: Tensor  # bool [rows, 1, 1]
    top_k: Tensor  # long [rows, 1, 1], the vocabulary size where off
    top_p: Tensor  # [rows, 1, 1], infinite where off
    truncated: Tensor  # bool [rows, 1, 1], where top-k or top-p is on
    min_p: Tensor  # [rows, 1, 1], 0 where off
    penalty: RepetitionPenalty | None  # None = no row has one
    all_greedy: bool
    any_greedy: bool
    any_scaled: bool
    any_truncated: bool
    any_min_p: bool

    @classmethod
    def of_requests(
        cls, requests: Sequence[Request], vocab: int, device: torch.device, seen: Tensor | None = None
    ) -> SamplingSettings:
        """Args: `seen` [rows, vocab] as of `RepetitionPenalty`; needed when a request has a penalty."""

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)

        sampled = [r.temperature > 0 for r in requests]
        truncated = [bool(s and (r.top_k or r.top_p < 1)) for s, r in zip(sampled, requests, strict=True)]
        min_ps = [r.min_p if s else 0.0 for s, r in zip(sampled, requests, strict=True)]
        temperatures = [max(r.temperature, SMALLEST_TEMPERATURE) if r.temperature > 0 else 1.0 for r in requests]
        penalties = [r.repetition_penalty for r in requests]
        penalty = None
        if any(p != 1 for p in penalties):
            assert seen is not None
            penalty = RepetitionPenalty(column(penalties, torch.float32), seen)
        return cls(
            temperature=column(temperatures, torch.float32),
            greedy=column([not s for s in sampled], torch.bool),
            top_k=column([min(r.top_k, vocab) or vocab for r in requests], torch.long),
            top_p=column([r.top_p if r.top_p < 1 else torch.inf for r in requests], torch.float32),
            truncated=column(truncated, torch.bool),
            min_p=column(min_ps, torch.float32),
            penalty=penalty,
            all_greedy=not any(sampled),
            any_greedy=not all(sampled),
            any_scaled=any(t != 1 for t in temperatures),
            any_truncated=any(truncated),
            any_min_p=any(min_ps),
        )

    @property
    def is_plain(self) -> bool:
        """Whether a distribution is softmax(logits / temperature), or one-hot, and no more."""
        return not (self.any_truncated or self.any_min_p)

    @cached_property
    def temperatures(self) -> Tensor:
        """float32 [rows], 0 where greedy."""
        return self.temperature.masked_fill(self.greedy, 0.0).flatten()

    @cached_property
    def cut(self) -> Tensor:
        """bool [rows, 1, 1], where top-k, top-p or min-p is on."""
        return self.truncated | (self.min_p > 0)

    @property
    def limits(self) -> Limits:
        """Each [rows, 1, 1]."""
        return Limits(self.top_k, self.top_p, self.min_p)

    @property
    def flags(self) -> tuple[bool, ...]:
        """What the control flow depends on."""
        return (self.all_greedy, self.any_greedy, self.any_scaled, self.any_truncated, self.any_min_p)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it reads besides; without a penalty."""
        return (self.temperature, self.greedy, self.top_k, self.top_p, self.truncated, self.min_p)

    def with_tensors(self, tensors: Sequence[Tensor]) -> SamplingSettings:
        """The same with other `tensors`."""
        temperature, greedy, top_k, top_p, truncated, min_p = tensors
        return replace(
            self,
            temperature=temperature,
            greedy=greedy,
            top_k=top_k,
            top_p=top_p,
            truncated=truncated,
            min_p=min_p,
        )

    def of_rows(self, rows: Tensor) -> SamplingSettings:
        """Of some rows, by bool [rows]; without a penalty. The host waits for the device."""
        part = self.with_tensors([tensor[rows] for tensor in self.tensors])
        greedy = part.greedy
        return replace(
            part,
            penalty=None,
            all_greedy=bool(greedy.all()),
            any_greedy=bool(greedy.any()),
            any_truncated=bool(part.truncated.any()),
            any_min_p=bool(part.min_p.any()),
        )


def probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Distribution after temperature, top-k, top-p and min-p, in float32: [rows, tokens, vocab] -> same shape.

    Top-p keeps the smallest set of most likely tokens whose mass reaches p. Min-p drops tokens less likely than p times
    the most likely one. Ties at a border are kept. The penalty of the settings counts as applied to the logits already.
    """
    logits = logits.float()
    result = _softmax(logits, settings)
    if not settings.is_plain:
        kept = result.masked_fill(result < _border(result, settings), 0.0)
        result = torch.where(settings.cut, kept / kept.sum(-1, keepdim=True), result)
    if settings.any_greedy:
        one_hot = torch.zeros_like(result).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        result = torch.where(settings.greedy, one_hot, result)
    return result


def _softmax(logits: Tensor, settings: SamplingSettings) -> Tensor:
    return torch.softmax(logits / settings.temperature if settings.any_scaled else logits, dim=-1)


def _border(result: Tensor, settings: SamplingSettings) -> Tensor:
    """The smallest probability that is kept: [rows, tokens, vocab] -> [rows, tokens, 1]"""
    if not settings.any_truncated:
        return settings.min_p * result.amax(-1, keepdim=True)
    rows, tokens, _ = result.shape
    wanted, *limits = (tensor.expand(rows, tokens, 1).reshape(-1, 1) for tensor in (settings.cut, *settings.limits))
    return smallest_kept(result.flatten(0, 1), Limits(*limits), wanted).view(rows, tokens, 1)


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


def draw_token(logits: Tensor, settings: SamplingSettings, uniform: Tensor | None) -> Tensor:
    """The token that `draw` draws, up to rounding, where nobody needs the distribution.

    Args:
        logits: [rows, vocab]
        uniform: float64 [rows]; not needed when every row is greedy.

    Returns:
        Token ids [rows].
    """
    if uniform is None or settings.is_plain or logits.device.type != "cpu":
        return draw(logits[:, None], settings, None if uniform is None else uniform[:, None])[0][:, 0]
    cut = settings.cut.flatten()
    if cut.all():
        limits = Limits(*(limit[:, 0] for limit in settings.limits))
        return draw_kept(_softmax(logits.float()[:, None], settings)[:, 0], limits, uniform)
    tokens = torch.empty(len(logits), dtype=torch.long)
    for rows in (cut, ~cut):
        tokens[rows] = draw_token(logits[rows], settings.of_rows(rows), uniform[rows])
    return tokens


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
