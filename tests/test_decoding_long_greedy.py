"""Greedy output over hundreds of tokens is that of plain decoding: every policy and rule, whoever shares the batch."""

from __future__ import annotations

import pytest
import torch
from decoding_world import Replay, random_target

from deepspec.decoding import Proposal, Request, SpeculativeEngine
from deepspec.decoding.policies import POLICIES, PolicySetup, build_policy
from deepspec.decoding.sps import SpsTable
from deepspec.decoding.verification import VERIFICATION_RULES

NEW_TOKENS, BLOCK, SLOTS = 250, 6, 3
LATE = {1: 2, 2: 5, 3: 5, 4: 40, 5: 41, 6: 77}  # request -> the round before which it comes
# Passes of 3 to 21 tokens; the twelfth is dear.
TABLE = SpsTable([1, 11, 12, 21], [1.0, 1 / 1.4, 1 / 2.2, 1 / 2.5])


class ConfidentReplay(Replay):
    """Confidences that change with the position, right or wrong."""

    has_confidences = True

    def propose(self, anchors, positions, *args):
        tokens = super().propose(anchors, positions, *args).tokens
        slots = positions[:, None] + torch.arange(tokens.shape[1])
        return Proposal(tokens, None, 0.5 + 0.5 * (slots * 7 % 11) / 10)


@pytest.fixture(scope="module")
def world():
    """A target, greedy requests, and what plain decoding makes of each alone."""
    target = random_target(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=512, seed=3
    )
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 31, (1 + 6 * i,), generator=generator).tolist() for i in range(7)]
    requests = [Request(prompt, NEW_TOKENS - 20 * i) for i, prompt in enumerate(prompts)]
    plain = SpeculativeEngine(target, slots=1, max_length=320)
    outputs = [plain.generate([request])[0].output_ids for request in requests]
    assert len({token for output in outputs for token in output}) > 10
    return target, requests, outputs


def replay_engine(world, policy: str, **options) -> SpeculativeEngine:
    target, requests, outputs = world
    replay = ConfidentReplay([r.prompt_ids for r in requests], outputs, BLOCK, wrong_every=9)
    setup = PolicySetup(
        BLOCK,
        SLOTS,
        has_confidences=True,
        draft_tokens=1 if policy == "fixed_1" else None,
        confidence_threshold=0.6 if policy == "threshold" else 0.0,
        sps=TABLE,
    )
    built = build_policy("fixed" if policy == "fixed_1" else policy, setup)
    return SpeculativeEngine(target, replay, slots=SLOTS, max_length=320, policy=built, **options)


@pytest.mark.parametrize(("rule", "graphs"), [("token", False), ("block", False), ("block", True)])
@pytest.mark.parametrize("policy", ["fixed_1", *POLICIES])
def test_requests_that_come_late(world, policy, rule, graphs):
    _, requests, outputs = world
    engine = replay_engine(world, policy, verification=rule, graphs=graphs)
    numbers = {engine.submit(requests[0]): 0}
    coming, completions, steps = dict(LATE), {}, 0
    while coming or engine.active or engine.waiting:
        for index in [index for index, step in coming.items() if step <= steps]:
            numbers[engine.submit(requests[index])] = index
            del coming[index]
        for number, completion in engine.step():
            completions[numbers[number]] = completion
        steps += 1
        assert engine.active <= SLOTS
    assert [completions[i].output_ids for i in range(len(requests))] == outputs
    rounds = [r for completion in completions.values() for r in completion.rounds]
    assert sum(r.accepted for r in rounds) > (0.5 if policy == "fixed_1" else 1.0) * len(rounds)
    assert any(r.accepted < r.proposed for r in rounds)
    if policy not in ("fixed", "fixed_1"):
        assert len({r.proposed for r in rounds}) > 3


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
@pytest.mark.parametrize("policy", ["fixed_1", *POLICIES])
def test_beside_sampled_rows(world, policy, rule):
    _, requests, outputs = world
    sampled = [Request([i, i], 60 + 9 * i, temperature=1.0, seed=i) for i in range(6)]
    mixed = [request for pair in zip(requests, sampled, strict=False) for request in pair]
    completions = replay_engine(world, policy, verification=rule).generate(mixed)
    assert [c.output_ids for c in completions[::2]] == outputs[:6]
    assert len({tuple(c.output_ids[:20]) for c in completions[1::2]}) == 6


def test_sampled_rows_beside_a_draft_that_names_no_distribution_are_those_of_the_draft_that_does(world):
    """Drafted tokens are then taken for certain, and not kept merely for being the target's likeliest."""
    _, requests, outputs = world
    engine = replay_engine(world, "fixed", verification="token")
    again = [Request(r.prompt_ids, 40, temperature=1.0, seed=i) for i, r in enumerate(requests)]
    silent = engine.generate(again)
    propose = engine.proposer.propose

    def naming(*args):
        proposal = propose(*args)
        return Proposal(proposal.tokens, torch.nn.functional.one_hot(proposal.tokens, 31).float(), proposal.confidences)

    engine.proposer.propose = naming
    assert [c.output_ids for c in engine.generate(again)] == [c.output_ids for c in silent]
    assert all(c.output_ids != output[:40] for c, output in zip(silent, outputs, strict=True))
