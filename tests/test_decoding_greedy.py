"""Greedy output equals `generate` of Transformers token for token, whatever is proposed, however rows are batched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import GOLDENS
from decoding_world import Replay, generated, random_draft, random_target

from deepspec import load_draft
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine

PROMPTS, LONGEST = 50, 30


@pytest.fixture(scope="module", params=["qwen3_trained_draft", "llama_random_draft"])
def case(request, golden_target):
    """Target, draft, greedy requests of mixed lengths, and what Transformers generates."""
    if request.param == "qwen3_trained_draft":
        target, new_tokens = golden_target, 12
        draft = load_draft(GOLDENS / "ckpt_dspark_rnn")
    else:
        target, new_tokens = random_target("llama"), 8
        draft = random_draft(target)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, LONGEST + 1, (PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(0, target.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    requests = [Request(prompt, new_tokens) for prompt in prompts]
    return target, draft, requests, [generated(target, prompt, new_tokens) for prompt in prompts]


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_greedy_output_equals_generate(case, slots):
    target, draft, requests, expected = case
    engine = SpeculativeEngine(target, DSparkProposer(draft, target), slots=slots, max_length=LONGEST + 20 + 7)
    completions = engine.generate(requests)
    assert [completion.output_ids for completion in completions] == expected
    assert len({tuple(output) for output in expected}) > PROMPTS // 2  # not a target that says one thing
    assert any(r.accepted for completion in completions for r in completion.rounds)


def test_plain_decoding_equals_generate(case):
    target, _, requests, expected = case
    completions = SpeculativeEngine(target, slots=8, max_length=LONGEST + 20).generate(requests)
    assert [completion.output_ids for completion in completions] == expected
    assert all(
        (r.proposed, r.accepted, r.emitted) == (0, 0, 1) for completion in completions for r in completion.rounds
    )


def test_greedy_rows_beside_sampled_rows_are_still_greedy(case):
    target, draft, requests, expected = case
    engine = SpeculativeEngine(target, DSparkProposer(draft, target), slots=4, max_length=60)
    completions = engine.generate(
        [replace(request, temperature=float(i % 2)) for i, request in enumerate(requests[:12])]
    )
    assert [completion.output_ids for completion in completions][::2] == expected[:12:2]
    assert [completion.output_ids for completion in completions][1::2] != expected[1:12:2]


PENALTIES = (1.3, 1.0, 1.05, 0.8)  # of the requests in turn


@pytest.mark.parametrize("proposer", ["draft", "replay", "none"])
def test_greedy_output_with_a_repetition_penalty_equals_generate(case, proposer):
    target, draft, requests, free = case
    requests = [
        replace(request, max_new_tokens=20, repetition_penalty=PENALTIES[i % 4])
        for i, request in enumerate(requests[:20])
    ]
    prompts = [request.prompt_ids for request in requests]
    expected = [generated(target, r.prompt_ids, 20, repetition_penalty=r.repetition_penalty) for r in requests]
    proposers = {
        "draft": lambda: DSparkProposer(draft, target),
        "replay": lambda: Replay(prompts, expected, block_size=6, wrong_every=5),
        "none": lambda: None,
    }
    engine = SpeculativeEngine(target, proposers[proposer](), slots=6, max_length=LONGEST + 30)
    completions = engine.generate(requests)
    assert [completion.output_ids for completion in completions] == expected
    changed = [output[: len(plain)] != plain for output, plain in zip(expected, free, strict=False)]
    assert sum(changed) >= 5
    assert not any(changed[1::4])
    if proposer == "replay":
        rounds = [r for completion in completions for r in completion.rounds]
        assert sum(r.accepted for r in rounds) > 2 * len(rounds)
