"""What the G-tests of test_decoding_lossless.py notice: verifiers, drafts and schedulers that are subtly wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lossless_world import (
    BLOCK,
    CLIFF,
    REJECTED,
    InPairs,
    Opinionated,
    engine_of,
    engine_with,
    p_values,
    sampled,
    tiny_draft,
    tiny_target,
)

from deepspec.decoding import proposers
from deepspec.decoding.penalties import RepetitionPenalty
from deepspec.decoding.policies import Policy
from deepspec.decoding.sampling import draw, probabilities, sample
from deepspec.decoding.scheduling import Ranking, RoundCost, best_places
from deepspec.decoding.verification import VERIFICATION_RULES, Verdict, verify_greedy, verify_tokens

PLAIN = {"temperature": 1.0}
MIN_P = {"temperature": 0.8, "min_p": 0.15}
PENALISED = {"temperature": 1.0, "repetition_penalty": 1.8}


def assert_noticed(engine, sampling) -> None:
    values = p_values(sampled(engine, sampling), sampling)
    assert min(values) < REJECTED, values


def accept_the_likeliest(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Keeps drafted tokens that equal the target's argmax, as some decoders do at any temperature."""
    accepted = verify_greedy(tokens, target.argmax(-1), lengths).accepted
    return Verdict(accepted, sample(target[torch.arange(len(tokens)), accepted], after))


def two_percent_shift(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Moves two percentage points of probability from the target's likeliest next token to its least likely one."""
    shifted = target.clone()
    shifted.scatter_add_(-1, target.argmax(-1, keepdim=True), torch.full_like(target[..., :1], -0.02))
    shifted.scatter_add_(-1, target.argmin(-1, keepdim=True), torch.full_like(target[..., :1], 0.02))
    return verify_tokens(tokens, draft, shifted, lengths, accept, after)


def no_residual(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Corrects from the target's own distribution instead of what the draft left of it."""
    accepted = verify_tokens(tokens, draft, target, lengths, accept, after).accepted
    return Verdict(accepted, sample(target[torch.arange(len(tokens)), accepted], after))


@pytest.mark.parametrize("broken", [accept_the_likeliest, two_percent_shift, no_residual])
def test_a_broken_rule(broken, monkeypatch):
    monkeypatch.setitem(VERIFICATION_RULES, "token", broken)
    assert_noticed(engine_of(), PLAIN)


PAIR_COST = RoundCost(CLIFF, 2, BLOCK)


class Unconstrained(Policy):
    """The best of all numbers of places for the current confidences: the scheduler without its early stop."""

    maximum = BLOCK

    def lengths(self, confidences, rows):
        ranking = Ranking.of(confidences)
        return ranking.lengths(best_places(ranking.throughput(PAIR_COST.seconds(rows, BLOCK))))


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
def test_a_scheduler_that_searches_the_current_confidences(rule):
    """With the pairs, costs and confidences with which the schedulers `..._in_pairs` are exact."""
    proposer = Opinionated(tiny_draft(), tiny_target())
    assert_noticed(engine_of(proposer, policy=InPairs(Unconstrained), verification=rule), PLAIN)


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
@pytest.mark.parametrize("policy", ["threshold", "prefix", "asynchronous"])
def test_a_confidence_that_has_seen_its_own_token(policy, rule, monkeypatch):
    """The draft's probability of the token that it has drawn, as some decoders use it."""
    engine = engine_with(policy, verification=rule)
    propose = engine.proposer.propose

    def peeking(*args):
        proposal = propose(*args)
        return replace(proposal, confidences=proposal.probabilities.gather(-1, proposal.tokens[..., None])[..., 0])

    monkeypatch.setattr(engine.proposer, "propose", peeking)
    assert_noticed(engine, PLAIN)


def test_a_draft_that_lies_about_its_distribution(monkeypatch):
    """Tokens drawn at one temperature, judged by the probabilities of another."""
    engine = engine_of()
    propose = engine.proposer.propose

    def lying(*args):
        proposal = propose(*args)
        flattened = proposal.probabilities.sqrt()
        return replace(proposal, probabilities=flattened / flattened.sum(-1, keepdim=True))

    monkeypatch.setattr(engine.proposer, "propose", lying)
    assert_noticed(engine, PLAIN)


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
def test_a_penalty_that_forgets_the_drafted_tokens(rule, monkeypatch):
    """Every position judged by what was seen before the round."""
    monkeypatch.setattr(RepetitionPenalty, "apply_along", lambda penalty, logits, ids: penalty.apply(logits))
    assert_noticed(engine_of(verification=rule), PENALISED)


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
def test_a_draft_that_hides_its_min_p(rule, monkeypatch):
    """Tokens drawn after min-p, judged by the probabilities before it."""

    def hiding(logits, settings, uniform):
        return draw(logits, settings, uniform)[0], probabilities(logits, replace(settings, any_min_p=False))

    monkeypatch.setattr(proposers, "draw", hiding)
    assert_noticed(engine_of(verification=rule), MIN_P)
