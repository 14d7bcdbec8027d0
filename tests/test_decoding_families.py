"""Every family: greedy speculative decoding says what `generate` of Transformers says, token for token."""

from __future__ import annotations

import pytest
import torch
from decoding_world import Replay, random_draft
from family_world import FAMILIES, HYBRIDS, WRAPPERS, tiny_model

from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.targets import Target

BLOCK, NEW_TOKENS = 4, 14  # prompts and answers together pass the window of sliding layers several times
LENGTHS = (9, 2, 5, 5, 1, 12, 3)


class Case:
    """A target, greedy requests, and what `generate` says."""

    def __init__(self, family: str):
        self.target = Target(tiny_model(family), family)
        ids = torch.randint(1, 67, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS)
        self.prompts = [prompt.tolist() for prompt in ids]
        self.expected = [self._generated(prompt) for prompt in self.prompts]

    def _generated(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    def replay(self, wrong_every: int) -> Replay:
        return Replay(self.prompts, self.expected, BLOCK, wrong_every)

    def decode(self, proposer, slots: int, **options):
        engine = SpeculativeEngine(self.target, proposer, slots=slots, max_length=40, **options)
        completions = engine.generate([Request(prompt, NEW_TOKENS) for prompt in self.prompts])
        return [completion.output_ids for completion in completions], [r for c in completions for r in c.rounds]


@pytest.fixture(scope="module", params=[*FAMILIES, *WRAPPERS])
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("slots", [1, 5])
def test_a_draft_that_is_always_wrong_changes_nothing(case, slots):
    outputs, rounds = case.decode(case.replay(wrong_every=1), slots)
    assert outputs == case.expected
    assert sum(r.accepted for r in rounds) <= len(LENGTHS)  # only what stands behind a known end may be right by chance
    assert len({tuple(output) for output in outputs}) == len(LENGTHS)


@pytest.mark.parametrize("slots", [1, 5])
def test_a_draft_that_is_mostly_right_changes_nothing(case, slots):
    outputs, rounds = case.decode(case.replay(wrong_every=5), slots)
    assert outputs == case.expected
    assert len({r.accepted for r in rounds}) >= 3
    outputs, rounds = case.decode(case.replay(wrong_every=10**6), slots)
    assert outputs == case.expected
    assert sum(r.accepted for r in rounds) > 2.5 * len(rounds)


def test_plain_decoding_and_a_random_draft_say_the_same(case):
    outputs, _ = case.decode(None, 5)
    assert outputs == case.expected
    draft = random_draft(case.target, block_size=BLOCK, target_layer_ids=[0, 1, 2])
    outputs, rounds = case.decode(DSparkProposer(draft, case.target), 5)
    assert outputs == case.expected
    assert all(r.proposed for r in rounds)


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request):
    return Case(request.param)


@pytest.mark.parametrize("wrong_every", [1, 5])
def test_hybrid_states_survive_graphs(hybrid, wrong_every):
    outputs, _ = hybrid.decode(hybrid.replay(wrong_every), 5, graphs=True)
    assert outputs == hybrid.expected
