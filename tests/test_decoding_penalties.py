"""The repetition penalty: equal to Transformers', aware of drafted tokens, absent where nobody asks for it."""

from __future__ import annotations

import pytest
import torch
from decoding_world import random_draft, random_target
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.decoding.penalties import RepetitionPenalty, penalise, seen_along, seen_in
from deepspec.decoding.span import Span

VOCAB = 12
IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8)


def penalised_by_transformers(logits: torch.Tensor, read: list[int], penalty: float) -> torch.Tensor:
    """[vocab] -> [vocab]"""
    return RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([read]), logits[None])[0]


def seen_of(*reads: list[int]) -> torch.Tensor:
    return torch.stack([torch.isin(torch.arange(VOCAB), torch.tensor(read)) for read in reads])


def factors(*penalties: float) -> torch.Tensor:
    return torch.tensor(penalties).view(-1, 1, 1)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(IDS, st.floats(2**-6, 100, width=32)), min_size=1, max_size=3), IDS, st.integers(0, 99))
def test_each_position_of_a_verify_pass_equals_transformers(rows, drafted, seed):
    logits = 3 * torch.randn(len(rows), len(drafted) + 1, VOCAB, generator=torch.Generator().manual_seed(seed))
    reads, penalties = zip(*rows, strict=True)
    ids = torch.tensor([[read[-1], *drafted] for read in reads])
    result = RepetitionPenalty(factors(*penalties), seen_of(*reads)).apply_along(logits, ids)
    for i, (read, penalty) in enumerate(rows):
        for k in range(len(drafted) + 1):
            expected = penalised_by_transformers(logits[i, k], read + drafted[:k], penalty)
            assert torch.equal(result[i, k], expected)


@settings(max_examples=50, deadline=None)
@given(IDS, IDS)
def test_drafting_step_by_step_sees_what_the_verify_pass_sees(read, drafted):
    at_once = seen_along(seen_of(read), torch.tensor([[read[-1], *drafted]]))
    step = before = RepetitionPenalty(factors(1.2), seen_of(read))
    for k, token in enumerate(drafted):
        assert torch.equal(step.seen, at_once[:, k])
        step = step.after(torch.tensor([[token]]))
    assert torch.equal(step.seen, at_once[:, -1])
    assert torch.equal(before.seen, seen_of(read))


def test_a_round_leaves_what_it_kept():
    penalty = RepetitionPenalty(factors(1.2, 1.2, 1.2), seen_of([1, 2], [0], [5]))
    ids = torch.tensor([[2, 3, 4], [0, 7, 7], [5, 6, 8]])
    penalty.keep(ids, torch.tensor([1, 2, 0]), torch.tensor([9, 0, 10]))
    assert torch.equal(penalty.seen, seen_of([1, 2, 3, 9], [0, 7], [5, 10]))


def test_prompts_of_a_pass_see_their_own_tokens():
    """Packed prompts become rows in which the shorter ones repeat a token of theirs."""
    span = Span.of(range(3), [0, 0, 0], [4, 1, 2], torch.device("cpu"))
    rows = span.to_rows(torch.tensor([3, 4, 3, 5, 6, 0, 1]))
    assert torch.equal(seen_in(rows, VOCAB), seen_of([3, 4, 5], [6], [0, 1]))


def test_rows_without_a_penalty_keep_their_logits_to_the_bit():
    logits = torch.randn(2, 3, VOCAB)
    result = penalise(logits, seen_of([1, 2, 3], [1, 2, 3])[:, None], factors(1.0, 1.5))
    assert torch.equal(result[0], logits[0])
    assert result[1].ne(logits[1]).sum(-1).tolist() == [3, 3, 3]


def test_half_precision_logits_are_widened_first():
    logits = torch.randn(1, 1, VOCAB).bfloat16()
    result = penalise(logits, seen_of([1])[:, None], factors(1.3))
    assert torch.equal(result[0, 0], penalised_by_transformers(logits[0, 0].float(), [1], 1.3))


def test_no_table_without_a_request_that_needs_it(monkeypatch):
    target = random_target()
    engine = SpeculativeEngine(target, DSparkProposer(random_draft(target), target), slots=2, max_length=40)
    plain = [Request([i, 5], 9, float(i % 2), seed=i) for i in range(4)]
    before = engine.generate(plain)
    assert engine._seen is None
    mixed = [*plain, Request([3, 4], 9, repetition_penalty=1.5)]
    after = engine.generate(mixed)
    assert engine._seen.shape == (2, target.vocab_size)
    assert [c.output_ids for c in after[:4]] == [c.output_ids for c in before]
    monkeypatch.setattr("deepspec.decoding.penalties.penalise", lambda *_: pytest.fail("a penalty without need"))
    assert [c.output_ids for c in engine.generate(plain)] == [c.output_ids for c in before]


@pytest.mark.parametrize("algorithm", ["dspark", "dflash"])
@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_a_draft_avoids_what_was_seen(algorithm, temperature, monkeypatch):
    """Under the largest penalty no seen token is drafted; with a sequential head, none of the same round either."""
    target = random_target()
    heads = {} if algorithm == "dspark" else {"markov_rank": 0, "confidence_head": False}
    proposer = DSparkProposer(random_draft(target, algorithm=algorithm, **heads), target)
    propose, drafted = proposer.propose, []

    def recording(anchors, positions, *args):
        proposal = propose(anchors, positions, *args)
        drafted.append((positions[0].item(), proposal.tokens[0].tolist()))
        return proposal

    monkeypatch.setattr(proposer, "propose", recording)
    engine = SpeculativeEngine(target, proposer, max_length=20)
    for prompt in ([3, 1, 4, 1 + i] for i in range(40)):
        drafted.clear()
        request = Request(prompt, 6, temperature, repetition_penalty=100.0)
        output = engine.generate([request])[0].output_ids
        assert drafted
        for anchor, tokens in drafted:
            assert not set(tokens) & {*prompt, *output[: anchor - len(prompt) + 1]}
            assert algorithm == "dflash" or len(set(tokens)) == len(tokens)
