"""Bad input to the decoder: each mistake is answered with a message that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from decoding_world import random_draft, random_target

from deepspec.config import ConfigError
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine, memory
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.policies import (
    AsynchronousScheduler,
    ConfidenceThreshold,
    FixedLength,
    PolicySetup,
    PrefixScheduler,
    build_policy,
)
from deepspec.decoding.scheduling import RoundCost
from deepspec.decoding.sps import SpsTable, load_table
from deepspec.targets.attention import current_layout

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def target():
    return random_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_draft(target)


def test_a_prompt_longer_than_a_slot(target, draft):
    engine = SpeculativeEngine(target, DSparkProposer(draft, target), max_length=32)
    message = "request 0: a prompt of 33 tokens, 1 new ones and a block of 5 need 39 positions, a slot has 32; raise"
    for decode in (lambda request: engine.generate([request]), engine.submit):
        with pytest.raises(ValueError, match=message):
            decode(Request([1] * 33, 1))
    assert engine.waiting == 0
    assert len(engine.generate([Request([1] * 26, 1)])[0].output_ids) == 1


def test_an_empty_prompt(target):
    engine = SpeculativeEngine(target, max_length=32)
    engine.submit(Request([1], 2))
    with pytest.raises(ValueError, match="request 1: the prompt is empty"):
        engine.submit(Request([], 2))
    assert (engine.waiting, engine.submit(Request([2], 2))) == (1, 1)


def test_another_vocabulary(draft):
    with pytest.raises(ValueError, match=r"its embedding is \[61, 32\] \[vocab, hidden\], but that of .* \[50, 32"):
        DSparkProposer(draft, random_target(vocab_size=50))


def test_a_confidence_policy_without_confidences(target):
    silent = DSparkProposer(random_draft(target, confidence_head=False), target)
    with pytest.raises(ValueError, match=r"ConfidenceThreshold: this draft has no confidence head; train one with"):
        SpeculativeEngine(target, silent, max_length=32, policy=ConfidenceThreshold(0.5, 5))
    with pytest.raises(
        ConfigError, match=r"decode.policy=threshold: this draft has no confidence head; .*policy=fixed"
    ):
        build_policy("threshold", PolicySetup(5, 1, has_confidences=False))


TABLE = SpsTable((1, 64), (10.0, 5.0), (1, 8), (0.01, 0.02))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: FixedLength(99), r"FixedLength: verifies up to 99 tokens of a row, but the proposer drafts 5"),
        (lambda: ConfidenceThreshold(0.5, 7), r"ConfidenceThreshold: verifies up to 7 tokens"),
        (lambda: PrefixScheduler(RoundCost(TABLE, 2, 5), 5), r"PrefixScheduler: .* at most 2 rows, but .* has 3 slots"),
        (lambda: AsynchronousScheduler(RoundCost(TABLE, 2, 5), 5), r"make the RoundCost for 3 rows"),
        (lambda: build_policy("prefix", PolicySetup(5, 2, True, sps=TABLE)), r"Pausing: .* at most 2 rows"),
        (lambda: build_policy("prefix", PolicySetup(5, 1, True, sps=TABLE, temperatures=[1.0] * 5)), r"at most 1 rows"),
        (lambda: PrefixScheduler(RoundCost(TABLE, 3, 4), 5), r"RoundCost: made for blocks of 4 tokens, but asked .* 5"),
    ],
)
def test_a_policy_that_does_not_fit_the_engine(target, draft, policy, message):
    with pytest.raises(ConfigError, match=message):
        SpeculativeEngine(target, DSparkProposer(draft, target), slots=3, max_length=32, policy=policy())


def test_a_policy_for_fewer_tokens_or_more_rows_is_fine(target, draft):
    for policy in (FixedLength(2), PrefixScheduler(RoundCost(TABLE, 8, 7), 5)):
        engine = SpeculativeEngine(target, DSparkProposer(draft, target), slots=3, max_length=32, policy=policy)
        assert len(engine.generate([Request([1], 6)] * 3)[2].output_ids) == 6


def test_generate_does_not_lose_submitted_requests(target):
    engine = SpeculativeEngine(target, max_length=32)
    number = engine.submit(Request([1], 2))
    with pytest.raises(ValueError, match="1 submitted requests have not ended and `generate` would lose them"):
        engine.generate([Request([2], 2)])
    ended = []
    while engine.active or engine.waiting:
        ended += engine.step()
    assert [index for index, _ in ended] == [number]
    assert len(engine.generate([Request([2], 2)])[0].output_ids) == 2


def test_an_sps_table_of_another_machine(tmp_path, caplog):
    record = {"points": [{"tokens": 1, "steps_per_second": 9.0}], "machine": {"cpu": "an abacus"}}
    (tmp_path / "sps.json").write_text(json.dumps(record), encoding="utf-8")
    table = load_table(tmp_path / "sps.json")
    assert "sps.json is not an SPS table of this machine (cpu an abacus, here " in caplog.text
    assert "measure with python -m deepspec.decoding.profile" in caplog.text
    policy = build_policy("prefix", PolicySetup(5, 2, has_confidences=True, sps=table))
    assert policy.lengths(torch.ones(2, 5), 2).shape == (2,)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken_slot", [0, 1, 2])
def test_a_nan_among_rows_of_different_lengths(target, draft, broken_slot, temperature, graphs, monkeypatch):
    requests = [Request([i, i + 1], 12, temperature, seed=i) for i in range(6)]
    drafted = SpeculativeEngine(target, DSparkProposer(draft, target), slots=3, max_length=32).generate(requests)
    median = torch.tensor([c for completion in drafted for r in completion.rounds for c in r.confidences]).median()
    policy = ConfidenceThreshold(float(median), 5)
    engine = SpeculativeEngine(
        target, DSparkProposer(draft, target), slots=3, max_length=32, policy=policy, graphs=graphs
    )
    expected = engine.generate(requests)
    forward = target.forward

    def failing(*args):
        features, span = forward(*args), current_layout()
        if engine.timing.rounds == 0 and span.longest > 2:  # the first one
            of_row = span.slot_of == broken_slot
            features.final[0, of_row] = torch.nan
            features.context[0, of_row] = torch.nan
        return features

    monkeypatch.setattr(target, "forward", failing)
    completions = engine.generate(requests)
    proposed = {c.rounds[0].proposed for c in expected[:3]}
    assert len(proposed) > 1
    assert [c.finish_reason for c in completions].count("error") == 1
    for i, (completion, whole) in enumerate(zip(completions, expected, strict=True)):
        if completion.finish_reason == "error":
            assert i == broken_slot
            assert completion.output_ids == whole.output_ids[: len(completion.output_ids)]
            assert completion.rounds == []
        else:
            assert completion.output_ids == whole.output_ids


def test_slots_that_do_not_fit_the_memory(target, draft, monkeypatch):
    proposer = DSparkProposer(draft, target)
    each = SlotCache.bytes_per_slot(target, 64, 1 + proposer.block_size) + proposer.bytes_per_slot(64)
    assert each == 64 * 4 * (6 * 2 * 2 * 8 + 2 * 2 * 2 * 8)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * each + 5)
    message = r"decode.batch_size=4: the caches of so many slots of 64 positions need .* 3 would fit: lower"
    with pytest.raises(ConfigError, match=message):
        SpeculativeEngine(target, proposer, slots=4, max_length=64)
    assert proposer._store is None
    SpeculativeEngine(target, proposer, slots=3, max_length=64).generate([Request([1], 3)])


def test_free_memory_is_what_the_system_says(target):
    assert 2**20 < memory.free_bytes(target.device) < 2**50
    with pytest.raises(ConfigError, match=r"decode.batch_size=1000000000: .* would fit"):
        SpeculativeEngine(target, slots=10**9, max_length=64)
