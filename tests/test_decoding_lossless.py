"""Sampled output of the whole engine follows the target exactly: a G-test over thousands of requests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding_world import g_test, random_draft, random_target, warped

from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine, proposers
from deepspec.decoding.penalties import RepetitionPenalty
from deepspec.decoding.policies import ConfidenceThreshold
from deepspec.decoding.sampling import draw, probabilities, sample
from deepspec.decoding.verification import VERIFICATION_RULES, Verdict, verify_greedy, verify_tokens

VOCAB, TOKENS = 8, 3
PROMPT = [1, 5, 2]
REQUESTS, SLOTS = 12_000, 400
ACCEPTABLE, REJECTED = 1e-3, 1e-6  # p-values; seeded, so a verdict never flickers


@pytest.fixture(scope="module")
def target():
    return random_target(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        scale=0.5,
        seed=4,
    )


@pytest.fixture(scope="module")
def draft(target):
    """Untrained, so a poor guesser."""
    return random_draft(
        target, num_layers=1, block_size=2, target_layer_ids=[0, 1], mask_token_id=0, markov_rank=4, seed=2
    )


def exact(target, sampling: dict[str, Any]) -> list[torch.Tensor]:
    """Joint probabilities of the first one, two and three tokens, from uncached forward passes."""
    prefixes, joint, joints = torch.tensor([PROMPT]), torch.ones(1, dtype=torch.float64), []
    for _ in range(TOKENS):
        logits = target.model(prefixes, use_cache=False).logits[:, -1]
        joint = (joint[:, None] * warped(logits, **sampling, prefixes=prefixes)).flatten()
        joints.append(joint)
        following = torch.arange(VOCAB).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(VOCAB, 0), following], dim=1)
    return joints


def p_values(engine, target, sampling: dict[str, Any]) -> list[float]:
    requests = [Request(PROMPT, TOKENS, **sampling, seed=seed) for seed in range(REQUESTS)]
    completions = engine.generate(requests)
    outcomes = torch.tensor([completion.output_ids for completion in completions])
    assert any(r.accepted for completion in completions for r in completion.rounds)
    assert any(r.accepted < r.proposed for completion in completions for r in completion.rounds)
    code, values = torch.zeros(REQUESTS, dtype=torch.long), []
    joints = exact(target, sampling)
    for position in range(TOKENS):
        code = code * VOCAB + outcomes[:, position]
        values.append(g_test(code, joints[position]))
        marginal = joints[position].view(-1, VOCAB).sum(0)
        values.append(g_test(outcomes[:, position], marginal))
    return values


def engine_of(target, draft, **options) -> SpeculativeEngine:
    return SpeculativeEngine(target, DSparkProposer(draft, target), slots=SLOTS, max_length=8, **options)


def median_confidence(target, draft) -> float:
    """A threshold that cuts about half of the proposals short."""
    completions = engine_of(target, draft).generate([Request(PROMPT, TOKENS, 1.0, seed=seed) for seed in range(400)])
    confidences = [c for completion in completions for r in completion.rounds for c in r.confidences]
    return float(torch.tensor(confidences).median())


PLAIN = {"temperature": 1.0}
TRUNCATED = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
MIN_P = {"temperature": 0.8, "min_p": 0.15}
PENALISED = {"temperature": 1.0, "repetition_penalty": 1.8}
EVERYTHING = {"temperature": 1.2, "top_k": 7, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 0.6}


@pytest.mark.parametrize(
    ("verification", "is_cut", "sampling"),
    [
        ("token", False, PLAIN),
        ("token", True, TRUNCATED),
        ("block", False, TRUNCATED),
        ("block", True, PLAIN),
        ("token", False, MIN_P),
        ("block", True, MIN_P),
        ("token", True, PENALISED),
        ("block", False, PENALISED),
        ("block", False, EVERYTHING),
    ],
)
def test_sampled_output_follows_the_target(target, draft, verification, is_cut, sampling):
    policy = ConfidenceThreshold(median_confidence(target, draft), draft.block_size) if is_cut else None
    engine = engine_of(target, draft, verification=verification, policy=policy)
    values = p_values(engine, target, sampling)
    assert min(values) > ACCEPTABLE, values


def test_a_draft_without_a_sequential_head_may_penalise_all_slots_alike(target):
    parallel = random_draft(
        target,
        algorithm="dflash",
        num_layers=1,
        block_size=2,
        target_layer_ids=[0, 1],
        mask_token_id=0,
        markov_rank=0,
        confidence_head=False,
        seed=2,
    )
    values = p_values(engine_of(target, parallel), target, PENALISED)
    assert min(values) > ACCEPTABLE, values


def accept_the_likeliest(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Keeps drafted tokens that equal the target's argmax, as some decoders do at any temperature."""
    accepted = verify_greedy(tokens, target.argmax(-1), lengths).accepted
    return Verdict(accepted, sample(target[torch.arange(len(tokens)), accepted], after))


def one_percent_shift(tokens, draft, target, lengths, accept, after) -> Verdict:
    """Moves one percentage point of probability from the target's likeliest next token to its least likely one."""
    shifted = target.clone()
    shifted.scatter_add_(-1, target.argmax(-1, keepdim=True), torch.full_like(target[..., :1], -0.01))
    shifted.scatter_add_(-1, target.argmin(-1, keepdim=True), torch.full_like(target[..., :1], 0.01))
    return verify_tokens(tokens, draft, shifted, lengths, accept, after)


@pytest.mark.parametrize("broken", [accept_the_likeliest, one_percent_shift])
def test_a_broken_rule_is_noticed(target, draft, broken, monkeypatch):
    monkeypatch.setitem(VERIFICATION_RULES, "token", broken)
    values = p_values(engine_of(target, draft), target, PLAIN)
    assert min(values) < REJECTED, values


def test_a_draft_that_lies_about_its_distribution_is_noticed(target, draft, monkeypatch):
    """Tokens drawn at one temperature, judged by the probabilities of another."""
    engine = engine_of(target, draft)
    propose = engine.proposer.propose

    def lying(*args):
        proposal = propose(*args)
        flattened = proposal.probabilities.sqrt()
        proposal.probabilities.copy_(flattened / flattened.sum(-1, keepdim=True))
        return proposal

    monkeypatch.setattr(engine.proposer, "propose", lying)
    values = p_values(engine, target, PLAIN)
    assert min(values) < REJECTED, values


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_penalty_that_forgets_the_drafted_tokens_is_noticed(target, draft, verification, monkeypatch):
    """Every position judged by what was seen before the round."""
    monkeypatch.setattr(RepetitionPenalty, "apply_along", lambda penalty, logits, ids: penalty.apply(logits))
    values = p_values(engine_of(target, draft, verification=verification), target, PENALISED)
    assert min(values) < REJECTED, values


@pytest.mark.parametrize("verification", ["token", "block"])
def test_a_draft_that_hides_its_min_p_is_noticed(target, draft, verification, monkeypatch):
    """Tokens drawn after min-p, judged by the probabilities before it."""

    def hiding(logits, settings, uniform):
        return draw(logits, settings, uniform)[0], probabilities(logits, replace(settings, any_min_p=False))

    monkeypatch.setattr(proposers, "draw", hiding)
    values = p_values(engine_of(target, draft, verification=verification), target, MIN_P)
    assert min(values) < REJECTED, values
