"""Prompt lookup: what it proposes, and that the engine stays exact with it."""

from __future__ import annotations

import pytest
import torch
from decoding_world import random_target

from deepspec.decoding import LookupProposer, Request, SpeculativeEngine
from deepspec.decoding.policies import ConfidenceThreshold
from deepspec.decoding.sampling import SamplingSettings
from deepspec.decoding.span import Span


def proposed(rows: list[list[int]], length: int = 3, **options) -> list[list[int | None]]:
    """What follows these tokens; None where nothing is proposed."""
    proposer = LookupProposer(block_size=length, **options)
    proposer.allocate(len(rows), 32)
    device = torch.device("cpu")
    known = [row[:-1] for row in rows]
    span = Span.of(range(len(rows)), [0] * len(rows), [len(row) for row in known], device)
    proposer.observe(span, torch.tensor([token for row in known for token in row]), torch.empty(0))
    anchors, positions = torch.tensor([row[-1] for row in rows]), torch.tensor([len(row) for row in known])
    settings = SamplingSettings.of_requests([Request([1], 1, temperature=1.0)] * len(rows), 100, device)
    proposal = proposer.propose(anchors, positions, int(positions.max()), settings, None, length)
    assert proposal.probabilities is None
    return [
        [token if confidence else None for token, confidence in zip(tokens, confidences, strict=True)]
        for tokens, confidences in zip(proposal.tokens.tolist(), proposal.confidences.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5]),
        ([1, 2, 3, 9, 2, 7, 8, 9, 1, 2], [3, 9, 2]),  # the longer n-gram counts more than the later place
        ([2, 3, 9, 2, 7, 8, 5, 2], [7, 8, 5]),  # of equal ones the latest
        ([4, 4], [4, None, None]),  # up to the anchor, and no further
        ([7, 8, 7], [8, 7, None]),
        ([1, 2, 3, 4], [None, None, None]),
    ],
)
def test_proposal(row, expected):
    assert proposed([row]) == [expected]


def test_rows_do_not_see_each_other():
    rows = [[1, 2, 3, 4, 5, 1, 2], [9, 9, 1, 2, 6, 6, 6, 2], [5, 1]]
    assert proposed(rows) == [proposed([row])[0] for row in rows]


def test_longest_ngram():
    row = [1, 2, 7, 3, 2, 8, 1, 2]
    assert proposed([row], longest=1) == [[8, 1, 2]]
    assert proposed([row], longest=2) == [[7, 3, 2]]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_greedy_output_is_that_of_plain_decoding(threshold):
    target = random_target()
    generator = torch.Generator().manual_seed(0)
    requests = [Request(torch.randint(0, 61, (3 + 5 * i,), generator=generator).tolist(), 40 - 3 * i) for i in range(7)]
    plain = SpeculativeEngine(target, slots=3, max_length=128).generate(requests)
    proposer = LookupProposer()
    policy = None if threshold is None else ConfidenceThreshold(threshold, proposer.block_size)
    looked_up = SpeculativeEngine(target, proposer, slots=3, max_length=128, policy=policy).generate(requests)
    assert [c.output_ids for c in looked_up] == [c.output_ids for c in plain]
    rounds = [r for completion in looked_up for r in completion.rounds]
    assert any(r.accepted for r in rounds)
    assert any(r.proposed == 0 for r in rounds) == (threshold is not None)


def test_works_where_the_engines_tokens_are():
    proposer = LookupProposer()
    proposer.allocate(1, 4)
    ids = torch.tensor([1, 2], device="meta")
    span = Span.of([0], [0], [2], torch.device("meta"))
    proposer.observe(span, ids, torch.empty(2, 0))
    assert proposer._tokens.device == ids.device
