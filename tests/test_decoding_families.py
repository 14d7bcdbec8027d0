"""Every family: greedy speculative decoding says what `generate` of Transformers says, token for token."""

from __future__ import annotations

import pytest
import torch
from decoding_world import Replay, generated, random_draft
from family_world import FAMILIES, HYBRIDS, WRAPPERS, tiny_model

from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.passes import target_pass
from deepspec.decoding.policies import ConfidenceThreshold, PolicySetup, build_policy
from deepspec.decoding.span import Span
from deepspec.decoding.sps import SpsTable
from deepspec.targets import Target

BLOCK, NEW_TOKENS = 4, 11  # prompt and answer together pass the window of sliding layers twice and more
LENGTHS = (9, 5, 5, 1, 2, 7)  # one more than the slots: it enters late, and rows move to close gaps


class Case:
    """A target, greedy requests, and what `generate` says."""

    def __init__(self, family: str):
        self.target = Target(tiny_model(family), family)
        ids = torch.randint(1, 67, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS)
        self.prompts = [prompt.tolist() for prompt in ids]
        self.expected = [generated(self.target, prompt, NEW_TOKENS) for prompt in self.prompts]

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
def test_a_draft_that_is_right_or_mostly_right_changes_nothing(case, slots):
    outputs, rounds = case.decode(case.replay(wrong_every=4), slots)
    assert outputs == case.expected
    assert any(0 < r.accepted < r.proposed for r in rounds)
    outputs, rounds = case.decode(case.replay(wrong_every=10**6), slots)
    assert outputs == case.expected
    assert all(r.accepted == BLOCK for r in rounds)


def test_plain_decoding_and_a_random_draft_say_the_same(case):
    draft = random_draft(case.target, block_size=BLOCK, target_layer_ids=[0, 1, 2])
    for proposer in (None, DSparkProposer(draft, case.target)):
        outputs, rounds = case.decode(proposer, 5)
        assert outputs == case.expected
        assert all(bool(r.proposed) == bool(proposer) for r in rounds)


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request):
    return Case(request.param)


@pytest.mark.parametrize("policy", ["threshold", "prefix", "asynchronous"])
@pytest.mark.parametrize("graphs", [False, True])
def test_states_of_hybrids_under_verification_lengths_that_vary(hybrid, policy, graphs):
    draft = random_draft(hybrid.target, block_size=BLOCK, target_layer_ids=[0, 1, 2])
    _, rounds = hybrid.decode(DSparkProposer(draft, hybrid.target), 5)
    table = SpsTable([1, 25], [1.0, 0.4])  # passes per second fall with the tokens in them, so some are not worth it
    threshold = float(torch.tensor([c for r in rounds for c in r.confidences]).median())
    setup = PolicySetup(BLOCK, 5, has_confidences=True, sps=table)
    built = ConfidenceThreshold(threshold, BLOCK) if policy == "threshold" else build_policy(policy, setup)
    outputs, rounds = hybrid.decode(DSparkProposer(draft, hybrid.target), 5, policy=built, graphs=graphs)
    assert outputs == hybrid.expected
    assert len({r.proposed for r in rounds}) > 2


@pytest.mark.parametrize("wrong_every", [1, 4])
def test_states_of_hybrids_on_the_fixed_buffers_of_graphs(hybrid, wrong_every):
    outputs, _ = hybrid.decode(hybrid.replay(wrong_every), 5, graphs=True)
    assert outputs == hybrid.expected


@torch.no_grad()
def test_a_verify_pass_of_a_hybrid_is_as_many_single_steps(hybrid):
    """Transformers computes the two by different code, and of Mamba-2 layers once did not by the same formula."""
    target, ids = hybrid.target, torch.arange(1, 9)

    def states(counts: list[int], *, is_certain: bool) -> torch.Tensor:
        cache, start, found = SlotCache(target, 1, 16, 4), 0, []
        cache.begin([0])
        for number, count in enumerate([4, *counts]):  # the prompt first
            span = Span.of(range(1), [start], [count], target.device)
            certain = is_certain or number == 0
            found.append(target_pass(target, None, cache, span, ids[start : start + count], is_certain=certain))
            if not certain:
                cache.keep({0: count}, count)
            start += count
        return torch.cat(found)

    expected = states([1, 1, 1, 1], is_certain=True)
    found = states([4], is_certain=False)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_memory_of_a_hybrid_state(hybrid):
    """Two states and block + 1 hidden states a layer, whatever the number of positions."""
    target = hybrid.target
    of_states = {
        "qwen3_next": 3 * 2 * (4 * 8 * 8 + 64 * 4) * 4,
        "qwen3_5_text": 3 * 2 * (4 * 8 * 8 + 64 * 4) * 4,
        "lfm2": 2 * 2 * (32 * 3) * 4,
        "nemotron_h": 2 * 2 * (4 * 8 * 8 + (32 + 2 * 2 * 8) * 4) * 4,
    }[target.config.model_type]
    inputs = len(target.memory.mixers) * (BLOCK + 1) * 32 * 4
    key_values = sum(2 * 2 * 8 * 4 for _ in target.memory.key_values)
    for columns in (10, 100):
        expected = of_states + inputs + columns * key_values
        assert SlotCache.bytes_per_slot(target, columns, BLOCK + 1) == expected
