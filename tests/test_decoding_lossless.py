"""The engine's output follows the target exactly: every policy, every rule, by G-tests over thousands of requests.

What such a test would notice is shown in test_decoding_lossless_power.py, with as many requests.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from decoding_world import random_draft
from family_world import tiny_model
from lossless_world import (
    ACCEPTABLE,
    BLOCK,
    POLICIES,
    PROMPT,
    REQUESTS,
    SLOTS,
    TOKENS,
    VOCAB,
    Opinionated,
    engine_of,
    engine_with,
    p_values,
    sampled,
    tiny_draft,
    tiny_target,
)

from deepspec.decoding import DSparkProposer, LookupProposer, Request, SpeculativeEngine
from deepspec.decoding.policies import ConfidenceThreshold, Pausing, PolicySetup, build_policy
from deepspec.decoding.sps import SpsTable
from deepspec.decoding.verification import VERIFICATION_RULES
from deepspec.targets import Target

SAMPLINGS = {"0.7": {"temperature": 0.7}, "1.0_top_p": {"temperature": 1.0, "top_p": 0.9}}
TRUNCATED = {"temperature": 0.7, "top_k": 4, "top_p": 0.9}
MIN_P = {"temperature": 0.8, "min_p": 0.15}
PENALISED = {"temperature": 1.0, "repetition_penalty": 1.8}
EVERYTHING = {"temperature": 1.2, "top_k": 5, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 0.6}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("rule", VERIFICATION_RULES)
@pytest.mark.parametrize("policy", POLICIES)
def test_sampled_output_follows_the_target(policy, rule, sampling):
    completions = sampled(engine_with(policy, verification=rule), sampling)
    values = p_values(completions, sampling)
    assert min(values) > ACCEPTABLE, values
    proposed = {r.proposed for completion in completions for r in completion.rounds}
    assert proposed == {"fixed": {2}, "fixed_1": {1}}.get(policy, {0, 1, 2})


@pytest.mark.parametrize("rule", VERIFICATION_RULES)
@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_output_is_the_targets(policy, rule):
    prompts = [list(prompt) for n in (1, 2, 3) for prompt in product(range(VOCAB), repeat=n)]
    completions = engine_with(policy, verification=rule).generate([Request(p, TOKENS) for p in prompts])
    for length in (1, 2, 3):
        chosen = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = torch.tensor([prompts[i] for i in chosen])
        for _ in range(TOKENS):
            with torch.inference_mode():
                best = tiny_target().model(tokens, use_cache=False).logits[:, -1].argmax(-1)
            tokens = torch.cat([tokens, best[:, None]], dim=1)
        assert [completions[i].output_ids for i in chosen] == tokens[:, length:].tolist()
    assert any(r.accepted for completion in completions for r in completion.rounds)


@pytest.mark.parametrize("policy", POLICIES)
def test_on_the_fixed_buffers_of_graphs(policy):
    """Beside greedy rows, and with idle ones as the requests run out."""
    sampling = SAMPLINGS["1.0_top_p"]
    engine = engine_with(policy, verification="block", graphs=True)
    greedy = [Request(PROMPT, TOKENS)] * 100
    completions = engine.generate(greedy + [Request(PROMPT, TOKENS, **sampling, seed=seed) for seed in range(REQUESTS)])
    values = p_values(completions[100:], sampling)
    assert min(values) > ACCEPTABLE, values
    assert len({tuple(completion.output_ids) for completion in completions[:100]}) == 1


def test_pauses_that_hang_on_the_last_round(monkeypatch):
    """A few rows and no running mean: whether a round drafts is then what the tokens before it have made of it."""
    monkeypatch.setattr(Pausing, "MEMORY", 0.0)
    table = SpsTable([1, 12], [1.0, 0.9], [4], [1.0])
    setup = PolicySetup(BLOCK, 4, has_confidences=True, sps=table)
    proposer = Opinionated(tiny_draft(), tiny_target())
    engine = engine_of(proposer, slots=4, policy=build_policy("prefix", setup))
    sampling = {"temperature": 1.0}
    completions = sampled(engine, sampling)
    values = p_values(completions, sampling)
    assert min(values) > ACCEPTABLE, values
    plain = [r.confidences is None for completion in completions for r in completion.rounds]
    assert 0.2 < sum(plain) / len(plain) < 0.8


@pytest.mark.parametrize("threshold", [None, 0.5])
@pytest.mark.parametrize("rule", VERIFICATION_RULES)
def test_prompt_lookup(rule, threshold):
    policy = None if threshold is None else ConfidenceThreshold(threshold, BLOCK)
    engine = engine_of(LookupProposer(BLOCK), policy=policy, verification=rule)
    sampling = SAMPLINGS["1.0_top_p"]
    values = p_values(sampled(engine, sampling), sampling)
    assert min(values) > ACCEPTABLE, values


@pytest.mark.parametrize(
    ("rule", "policy", "sampling"),
    [
        ("token", "threshold", TRUNCATED),
        ("block", "fixed", TRUNCATED),
        ("token", "fixed", MIN_P),
        ("block", "threshold", MIN_P),
        ("token", "threshold", PENALISED),
        ("block", "fixed", PENALISED),
        ("block", "prefix_in_pairs", EVERYTHING),
    ],
)
def test_whatever_the_sampling(rule, policy, sampling):
    values = p_values(sampled(engine_with(policy, verification=rule), sampling), sampling)
    assert min(values) > ACCEPTABLE, values


def test_a_draft_without_a_sequential_head_may_penalise_all_slots_alike():
    parallel = tiny_draft(algorithm="dflash", markov_rank=0, confidence_head=False)
    values = p_values(sampled(engine_of(DSparkProposer(parallel, tiny_target())), PENALISED), PENALISED)
    assert min(values) > ACCEPTABLE, values


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_sampled_output_of_a_sliding_and_of_a_hybrid_family(family):
    """A window that ends inside the prompt; states that are replayed after every rejection."""
    window = {"sliding_window": 2} if family == "gemma3_text" else {}
    target = Target(tiny_model(family, seed=1, vocab_size=VOCAB, **window), family)
    draft = random_draft(
        target, num_layers=1, block_size=BLOCK, target_layer_ids=(0, 1), mask_token_id=0, markov_rank=4, scale=0.5
    )
    proposer = DSparkProposer(draft, target)
    engine = SpeculativeEngine(
        target, proposer, slots=SLOTS, max_length=len(PROMPT) + TOKENS + BLOCK, policy=ConfidenceThreshold(0.5, BLOCK)
    )
    sampling = {"temperature": 1.0}
    values = p_values(sampled(engine, sampling), sampling, target)
    assert min(values) > ACCEPTABLE, values
