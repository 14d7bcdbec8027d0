"""Policies leave the output distribution alone: computed exactly, over every outcome of a tiny draft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch

from deepspec.decoding.policies import PolicySetup, build_policy
from deepspec.decoding.scheduling import Ranking, RoundCost, best_places
from deepspec.decoding.sps import SpsTable

VOCAB, SLOTS, ROWS = 2, 2, 2
TWO_TO_SIX = [2, 3, 4, 5, 6]  # tokens in the pass of two rows
GENTLE = SpsTable(TWO_TO_SIX, [1 / 1.0, 1 / 1.1, 1 / 1.25, 1 / 1.5, 1 / 1.9])
CLIFF = SpsTable(TWO_TO_SIX, [1 / 1.0, 1 / 1.2, 1 / 1.6, 1 / 1.61, 1 / 1.62])  # a fourth token is dear, others not
Lengths = Callable[[torch.Tensor], list[int]]


@dataclass(frozen=True)
class Tables:
    """One row: distributions of the next token after every prefix, and the confidences of its slots."""

    draft: list[np.ndarray]  # [vocab] * (n + 1) for n = 0..SLOTS - 1
    target: list[np.ndarray]  # for n = 0..SLOTS
    confidence: list[np.ndarray]  # of slot n, by the n tokens before it

    @classmethod
    def random(cls, seed: int) -> Tables:
        generator = np.random.default_rng(seed)

        def distributions(count: int) -> list[np.ndarray]:
            return [generator.dirichlet(np.ones(VOCAB), size=(VOCAB,) * n) for n in range(count)]

        confidence = [np.asarray(generator.random((VOCAB,) * n)) for n in range(SLOTS)]
        return cls(distributions(SLOTS), distributions(SLOTS + 1), confidence)

    def drafted(self, tokens: tuple[int, ...]) -> float:
        """The probability that the draft proposes these tokens."""
        return float(np.prod([self.draft[n][tokens[:n]][tokens[n]] for n in range(SLOTS)]))

    def exact(self) -> np.ndarray:
        """The target's joint distribution of SLOTS + 1 tokens."""
        joint = np.ones(())
        for conditional in self.target:
            joint = joint[..., None] * conditional
        return joint

    def completed(self, start: tuple[int, ...], next_token: np.ndarray) -> np.ndarray:
        """Joint distribution of SLOTS + 1 tokens: `start`, a token of this distribution, the rest from the target."""
        joint = np.zeros((VOCAB,) * (SLOTS + 1))
        rest = np.ones((VOCAB,) * (SLOTS + 1))
        for n in range(len(start) + 1, SLOTS + 1):
            rest = rest * self.target[n].reshape((VOCAB,) * (n + 1) + (1,) * (SLOTS - n))
        after = next_token.reshape((VOCAB,) + (1,) * (SLOTS - len(start)))
        joint[start] = after * rest[start]
        return joint


def by_tokens(row: Tables, tokens: tuple[int, ...], length: int) -> np.ndarray:
    """What token verification of the first `length` tokens emits, over its own randomness."""
    joint, reached = np.zeros((VOCAB,) * (SLOTS + 1)), 1.0
    for n in range(length):
        wanted, proposed = row.target[n][tokens[:n]], row.draft[n][tokens[:n]]
        kept = min(1.0, wanted[tokens[n]] / proposed[tokens[n]])
        if kept < 1:
            residual = np.maximum(wanted - proposed, 0)
            joint += reached * (1 - kept) * row.completed(tokens[:n], residual / residual.sum())
        reached *= kept
    return joint + reached * row.completed(tokens[:length], row.target[length][tokens[:length]])


def by_block(row: Tables, tokens: tuple[int, ...], length: int) -> np.ndarray:
    """The same for block verification."""
    kept, passes, following = 1.0, [1.0], []
    for n in range(length + 1):
        wanted = row.target[n][tokens[:n]]
        if n < length:
            residual = np.maximum(kept * wanted - row.draft[n][tokens[:n]], 0)
            surplus = residual.sum()
            following.append(residual / surplus if surplus > 0 else wanted)
            if n:
                passes.append(surplus / (surplus + 1 - kept) if surplus > 0 else 0.0)
            kept = min(1.0, kept * wanted[tokens[n]] / row.draft[n][tokens[:n]][tokens[n]])
        else:
            following.append(wanted)
            if n:
                passes.append(kept)
    joint, missed = np.zeros((VOCAB,) * (SLOTS + 1)), 1.0
    for n in range(length, -1, -1):
        joint += missed * passes[n] * row.completed(tokens[:n], following[n])
        missed *= 1 - passes[n]
    return joint


RULES = {"token": by_tokens, "block": by_block}


def emitted(rows: list[Tables], lengths: Lengths, rule, confidence=None) -> np.ndarray:
    """Joint distribution of what two rows emit, summed over all that their drafts may propose."""
    joint = np.zeros((VOCAB,) * (SLOTS + 1) * ROWS)
    read = confidence or (lambda row, tokens, n: row.confidence[n][tokens[:n]])
    for drafts in product(product(range(VOCAB), repeat=SLOTS), repeat=ROWS):
        shown = torch.tensor([[read(r, t, n) for n in range(SLOTS)] for r, t in zip(rows, drafts, strict=True)])
        first, second = (
            row.drafted(tokens) * rule(row, tokens, length)
            for row, tokens, length in zip(rows, drafts, lengths(shown), strict=True)
        )
        joint += np.multiply.outer(first, second)
    return joint


def error(rows: list[Tables], joint: np.ndarray) -> float:
    return float(np.abs(joint - np.multiply.outer(rows[0].exact(), rows[1].exact())).sum())


def lengths_of(name: str, table: SpsTable) -> Lengths:
    threshold = 0.5 if name == "threshold" else 0.0
    setup = PolicySetup(SLOTS, ROWS, has_confidences=True, confidence_threshold=threshold, sps=table)

    def lengths(confidences: torch.Tensor) -> list[int]:
        policy = build_policy(name, setup)
        for past in ([[0.99, 0.0], [0.99, 0.0]], [[0.1, 0.2], [0.3, 0.1]]):
            policy.lengths(torch.tensor(past), ROWS)
        return policy.lengths(confidences, ROWS).tolist()

    return lengths


def unconstrained(confidences: torch.Tensor) -> list[int]:
    ranking = Ranking.of(confidences)
    cost = RoundCost(CLIFF, ROWS, SLOTS)
    return ranking.lengths(best_places(ranking.throughput(cost.seconds(ROWS, SLOTS)))).tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["fixed", "threshold", "prefix", "asynchronous"])
def test_two_rows_that_share_a_pass_follow_the_target_exactly(name, rule):
    chosen = set()
    for table, seed in product((GENTLE, CLIFF), range(10)):
        lengths = lengths_of(name, table)

        def noted(confidences: torch.Tensor, lengths: Lengths = lengths) -> list[int]:
            decided = lengths(confidences)
            chosen.add(tuple(decided))
            return decided

        rows = [Tables.random(2 * seed), Tables.random(2 * seed + 1)]
        assert error(rows, emitted(rows, noted, RULES[rule])) < 1e-12
    assert len(chosen) >= {"fixed": 1, "threshold": 9, "prefix": 5, "asynchronous": 3}[name], chosen


@pytest.mark.parametrize("rule", RULES)
def test_searching_the_current_confidences_without_the_early_stop_is_noticed(rule):
    rows = [[Tables.random(2 * seed), Tables.random(2 * seed + 1)] for seed in range(10)]
    errors = [error(pair, emitted(pair, unconstrained, RULES[rule])) for pair in rows]
    assert max(errors) > 0.01, errors


@pytest.mark.parametrize("name", ["threshold", "prefix", "asynchronous"])
def test_a_confidence_that_has_seen_its_own_token_is_noticed(name):
    def peeking(row: Tables, tokens: tuple[int, ...], n: int) -> float:
        return float(row.target[n][tokens[:n]][tokens[n]])

    rows = [[Tables.random(2 * seed), Tables.random(2 * seed + 1)] for seed in range(10)]
    errors = [error(pair, emitted(pair, lengths_of(name, GENTLE), by_tokens, peeking)) for pair in rows]
    assert max(errors) > 0.01, errors


@pytest.mark.parametrize(("early_stop", "probability_of_a"), [(True, 0.70), (False, 0.85)])
def test_the_counterexample_of_the_paper(early_stop, probability_of_a):
    """Appendix A: one row, SPS 1.0, 0.5, 0.45, c_1 = 0.8; after A the draft is sure of its second token, else not."""
    table = SpsTable([1, 2, 3], [1.0, 0.5, 0.45])
    policy = build_policy("prefix", PolicySetup(SLOTS, 1, has_confidences=True, sps=table))
    wanted, proposed = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    probability = 0.0
    for token, second_confidence in enumerate([0.95, 0.05]):
        confidences = torch.tensor([[0.8, second_confidence]])
        ranking = Ranking.of(confidences)
        throughput = ranking.throughput(RoundCost(table, 1, SLOTS).seconds(1, SLOTS))
        length = policy.lengths(confidences, 1) if early_stop else ranking.lengths(best_places(throughput))
        if length == 0:
            probability += proposed[token] * wanted[0]
            continue
        kept = min(1.0, wanted[token] / proposed[token])
        residual = np.maximum(wanted - proposed, 0)
        corrected = residual[0] / residual.sum()
        probability += proposed[token] * (kept * (token == 0) + (1 - kept) * corrected)
    assert probability == pytest.approx(probability_of_a, abs=1e-12)
