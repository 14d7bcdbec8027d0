"""What is reported about decoded rounds, and how sure it is.

Accepted length and acceptance follow the published definitions (DSpark section 5): the token of the prefill pass is in
no round, and there is no bonus after an accepted stop token. Intervals are percentile bootstraps that resample prompts,
since rounds of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from deepspec.decoding import Round
from deepspec.decoding.reliability import Floats, reliability_bins, trust

COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; no interval when there was one prompt, no value when there was nothing to count."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


def tau_of(rounds: Sequence[Round]) -> float | None:
    """Accepted length: output tokens per verification round; None without a round."""
    return sum(r.emitted for r in rounds) / len(rounds) if rounds else None


def verify_rate(rounds: Sequence[Round]) -> float | None:
    """sum(accepted + 1) / sum(proposed + 1): the share of positions of the verification passes that was of use."""
    spent = sum(r.proposed + 1 for r in rounds)
    return sum(r.accepted + 1 for r in rounds) / spent if spent else None


def cond_accept(rounds: Sequence[Round], block_size: int) -> list[float | None]:
    """`cond_accept@k` for k = 1..block_size: P(token k accepted | k proposed and all earlier accepted)."""
    return _acceptance(rounds, [[r.proposed >= k and r.accepted >= k - 1 for r in rounds] for k in _slots(block_size)])


def survival(rounds: Sequence[Round], block_size: int) -> list[float | None]:
    """`survival@k` for k = 1..block_size: P(tokens 1..k all accepted | k proposed)."""
    return _acceptance(rounds, [[r.proposed >= k for r in rounds] for k in _slots(block_size)])


def _slots(block_size: int) -> range:
    return range(1, block_size + 1)


def _acceptance(rounds: Sequence[Round], considered: list[list[bool]]) -> list[float | None]:
    """For each k, the share of the considered rounds that accepted at least k tokens."""
    rates: list[float | None] = []
    for k, mask in enumerate(considered, start=1):
        chosen = [r for r, counts in zip(rounds, mask, strict=True) if counts]
        rates.append(sum(r.accepted >= k for r in chosen) / len(chosen) if chosen else None)
    return rates


class Resampler:
    """Seeded bootstrap: every call draws its own resamples, the same ones in every run."""

    def __init__(self, samples: int, seed: int = 0):
        self.samples = samples
        self._generator = np.random.default_rng(seed)

    def counts(self, items: int) -> Floats:
        """How often each item is drawn in each resample: [samples, items], rows add up to `items`."""
        return self._generator.multinomial(items, np.full(items, 1 / items), size=self.samples).astype(np.float64)

    def ratios(self, numerators: ArrayLike, denominators: ArrayLike) -> Floats:
        """Resampled sum(numerators) / sum(denominators): [samples], NaN where the denominator is 0."""
        above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
        counts = self.counts(len(above))
        return _divide(counts @ above, counts @ below)


def _divide(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _estimate(value: float, resampled: Floats, items: int) -> Estimate:
    known = resampled[np.isfinite(resampled)]
    if not np.isfinite(value):
        return Estimate(None)
    if items < 2 or not len(known):
        return Estimate(float(value))
    low, high = np.quantile(known, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(float(value), float(low), float(high))


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float], resampler: Resampler) -> Estimate:
    """sum(numerators) / sum(denominators) over prompts, e.g. output tokens over rounds = tau."""
    if not sum(denominators):
        return Estimate(None)
    value = sum(numerators) / sum(denominators)
    return _estimate(value, resampler.ratios(numerators, denominators), len(numerators))


def cond_accept_estimates(
    prompts: Sequence[Sequence[Round]], block_size: int, resampler: Resampler
) -> list[dict[str, Any]]:
    """`cond_accept@k` for k = 1..block_size with its interval, and `rounds`, how many of them it is a share of.

    Args:
        prompts: the rounds of each prompt.
    """
    positions = []
    for k in _slots(block_size):
        reached = [[r for r in rounds if r.proposed >= k and r.accepted >= k - 1] for rounds in prompts]
        accepted = [float(sum(r.accepted >= k for r in rounds)) for rounds in reached]
        estimate = ratio_estimate(accepted, [float(len(rounds)) for rounds in reached], resampler)
        positions.append({"rounds": sum(map(len, reached)), **estimate.as_dict()})
    return positions


def macro_estimate(sets: Sequence[tuple[Sequence[float], Sequence[float]]], resampler: Resampler) -> Estimate:
    """The mean over sets of sum(numerators) / sum(denominators); each set is resampled independently.

    Args:
        sets: per set, the numerators and the denominators of its prompts. A set without a round is left out.
    """
    counted = [(above, below) for above, below in sets if sum(below)]
    if not counted:
        return Estimate(None)
    value = float(np.mean([sum(above) / sum(below) for above, below in counted]))
    resampled = np.mean([resampler.ratios(above, below) for above, below in counted], axis=0)
    return _estimate(value, resampled, max(len(above) for above, _ in counted))


@dataclass(frozen=True)
class Pace:
    """Tokens and wall seconds of chunks of prompts, each decoded with and without the draft, one after the other."""

    speculative_tokens: Sequence[float]  # [chunks]
    speculative_seconds: Sequence[float]
    plain_tokens: Sequence[float]
    plain_seconds: Sequence[float]

    def speedup(self) -> float:
        plain = sum(self.plain_tokens) / sum(self.plain_seconds)
        return sum(self.speculative_tokens) / sum(self.speculative_seconds) / plain

    def resampled_speedup(self, resampler: Resampler) -> Floats:
        """[samples]; a chunk is drawn with both of its decodings, so what slowed the machine then cancels."""
        columns = (self.speculative_tokens, self.speculative_seconds, self.plain_tokens, self.plain_seconds)
        sums = resampler.counts(len(self.plain_tokens)) @ np.array(columns, dtype=np.float64).T
        return _divide(sums[:, 0] * sums[:, 3], sums[:, 1] * sums[:, 2])


def speedup_estimate(paces: Sequence[Pace], resampler: Resampler) -> Estimate:
    """Tokens per second with the draft over tokens per second without: of one set, or the mean over several."""
    if not paces:
        return Estimate(None)
    value = float(np.mean([pace.speedup() for pace in paces]))
    resampled = np.mean([pace.resampled_speedup(resampler) for pace in paces], axis=0)
    return _estimate(value, resampled, max(len(pace.plain_tokens) for pace in paces))


def reliability(rounds: Sequence[Round], bins: int = 10) -> dict[str, Any] | None:
    """How far the confidence head's c_k = P(token k accepted | earlier ones accepted) can be believed.

    Counts every slot whose earlier tokens were all accepted, whether or not its own was.

    Args:
        bins: of equal width over [0, 1].

    Returns:
        `slots` counted; `ece`, the expected calibration error sum_b n_b/n |observed_b - predicted_b|; `auc`, the area
        under the ROC curve (None when all slots had the same outcome); `bins`, the non-empty ones with `low`, `high`,
        `count`, `predicted` and `observed` means; `positions`, the same figures for each k that was reached, with `k`
        and without bins. None when no round has confidences.
    """
    slots = [
        (k, confidence, r.accepted >= k)
        for r in rounds
        for k, confidence in enumerate((r.confidences or [])[: min(r.proposed, r.accepted + 1)], start=1)
    ]
    if not slots:
        return None
    ks, predicted, observed = (np.array(column, dtype=np.float64) for column in zip(*slots, strict=True))
    positions = []
    for k in np.unique(ks):
        here, there = predicted[ks == k], observed[ks == k]
        means = {"predicted": float(here.mean()), "observed": float(there.mean())}
        positions.append({"k": int(k), "slots": len(here), **means, **trust(here, there, bins)})
    return {
        "slots": len(slots),
        **trust(predicted, observed, bins),
        "bins": reliability_bins(predicted, observed, bins),
        "positions": positions,
    }
