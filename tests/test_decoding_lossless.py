"""Sampled output of the whole engine follows the target exactly: a G-test over thousands of requests."""

from __future__ import annotations

import pytest
import torch
from decoding_world import g_test, random_draft, random_target, warped

from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.decoding.sampling import sample
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


def exact(target, temperature: float, top_k: int, top_p: float) -> list[torch.Tensor]:
    """Joint probabilities of the first one, two and three tokens, from uncached forward passes."""
    prefixes, joint, joints = torch.tensor([PROMPT]), torch.ones(1, dtype=torch.float64), []
    for _ in range(TOKENS):
        logits = target.model(prefixes, use_cache=False).logits[:, -1]
        joint = (joint[:, None] * warped(logits, temperature, top_k, top_p)).flatten()
        joints.append(joint)
        following = torch.arange(VOCAB).repeat(len(prefixes))[:, None]
        prefixes = torch.cat([prefixes.repeat_interleave(VOCAB, 0), following], dim=1)
    return joints


def p_values(engine, target, temperature: float, top_k: int, top_p: float) -> list[float]:
    requests = [Request(PROMPT, TOKENS, temperature, top_k, top_p, seed=seed) for seed in range(REQUESTS)]
    completions = engine.generate(requests)
    outcomes = torch.tensor([completion.output_ids for completion in completions])
    assert any(r.accepted for completion in completions for r in completion.rounds)
    assert any(r.accepted < r.proposed for completion in completions for r in completion.rounds)
    code, values = torch.zeros(REQUESTS, dtype=torch.long), []
    joints = exact(target, temperature, top_k, top_p)
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


@pytest.mark.parametrize(
    ("verification", "is_cut", "sampling"),
    [
        ("token", False, (1.0, 0, 1.0)),
        ("token", True, (0.7, 6, 0.9)),
        ("block", False, (0.7, 6, 0.9)),
        ("block", True, (1.0, 0, 1.0)),
    ],
)
def test_sampled_output_follows_the_target(target, draft, verification, is_cut, sampling):
    threshold = median_confidence(target, draft) if is_cut else 0.0
    engine = engine_of(target, draft, verification=verification, confidence_threshold=threshold)
    values = p_values(engine, target, *sampling)
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
    values = p_values(engine_of(target, draft), target, 1.0, 0, 1.0)
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
    values = p_values(engine, target, 1.0, 0, 1.0)
    assert min(values) < REJECTED, values
