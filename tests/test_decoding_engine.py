"""The engine's bookkeeping: slots, rewinding, stops and limits, failing rows, and what it refuses."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import GOLDENS
from decoding_world import random_draft, random_target

from deepspec import load_draft
from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.decoding import engine as engine_module
from deepspec.decoding.cache import KeyValueStore
from deepspec.decoding.graphs import no_collection
from deepspec.decoding.policies import ConfidenceThreshold
from deepspec.targets.attention import current_layout

MAX_LENGTH = 64


@pytest.fixture(scope="module")
def target():
    return random_target()


@pytest.fixture(scope="module")
def draft(target):
    return random_draft(target)


@pytest.fixture(scope="module")
def trained():
    """A draft that gets tokens accepted, for the reference's target."""
    return load_draft(GOLDENS / "ckpt_dspark_vanilla")


def engine_of(target, draft, **options) -> SpeculativeEngine:
    return SpeculativeEngine(target, DSparkProposer(draft, target), **({"max_length": MAX_LENGTH} | options))


def threshold_of(threshold: float) -> ConfidenceThreshold:
    return ConfidenceThreshold(threshold, 7)


def mixed_requests(vocab: int, count: int = 11) -> list[Request]:
    generator = torch.Generator().manual_seed(3)
    settings = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 0.0},
        {"temperature": 1.3, "min_p": 0.05},
        {"temperature": 0.0, "repetition_penalty": 1.4},
        {"temperature": 0.8, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.1},
    ]
    requests = []
    for i in range(count):
        prompt = torch.randint(0, vocab, (1 + 2 * i,), generator=generator).tolist()
        limit = 4 + (5 * i) % 17
        requests.append(Request(prompt, limit, **settings[i % len(settings)], seed=i, stop_token_ids=(7, 300 + i)))
    return requests


def outcome(completion):
    """All of a completion that is exact: everything but the confidences."""
    counts = [(r.proposed, r.accepted, r.emitted) for r in completion.rounds]
    return completion.output_ids, completion.finish_reason, counts


def outcomes(completions):
    return [outcome(completion) for completion in completions]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("verification", "threshold"), [("token", None), ("block", 0.5)])
def test_tokens_do_not_depend_on_what_else_is_in_the_batch(golden_target, trained, verification, threshold, graphs):
    """Nor on whether a round runs on the fixed buffers of graphs, with idle rows and repeated tokens."""
    requests = mixed_requests(golden_target.vocab_size)
    options = {"verification": verification, "policy": None if threshold is None else threshold_of(threshold)}
    alone = [engine_of(golden_target, trained, **options).generate([request])[0] for request in requests]
    for slots, order in ((3, range(11)), (8, range(10, -1, -1)), (11, range(11))):
        together = engine_of(golden_target, trained, slots=slots, graphs=graphs, **options).generate(
            [requests[i] for i in order]
        )
        for i, completion in zip(order, together, strict=True):
            assert outcome(completion) == outcome(alone[i])
    assert len({tuple(completion.output_ids) for completion in alone}) == len(requests)


def test_prompts_enter_in_passes_of_limited_size(golden_target, trained, monkeypatch):
    """Each prompt counts as the longest of its pass, and one alone always fits."""
    requests = [
        Request(request.prompt_ids, 3, seed=request.seed) for request in mixed_requests(golden_target.vocab_size, 8)
    ]
    at_once = outcomes(engine_of(golden_target, trained, slots=6).generate(requests))
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 12)  # prompts of 1 and 3 tokens, 5, 7, ...
    engine = engine_of(golden_target, trained, slots=6)
    for request in requests:
        engine.submit(request)
    entered = []
    while len(entered) < 3:
        before = engine.waiting
        engine.step()
        entered.append(before - engine.waiting)
    assert entered == [2, 1, 1]
    assert outcomes(engine_of(golden_target, trained, slots=6).generate(requests)) == at_once


def test_nothing_is_collected_during_a_capture():
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_engine_can_be_used_again(golden_target, trained):
    engine = engine_of(golden_target, trained, slots=3)
    requests = mixed_requests(golden_target.vocab_size)
    first = outcomes(engine.generate(requests))
    assert outcomes(engine.generate(requests[::-1])) == first[::-1]
    assert engine.generate([]) == []


def test_another_seed_gives_other_tokens(target, draft):
    engine = engine_of(target, draft, slots=2)
    first, second = engine.generate([Request([1, 2, 3], 20, temperature=1.0, seed=seed) for seed in (0, 1)])
    assert first.output_ids != second.output_ids


class Poisoned(KeyValueStore):
    """Overwrites with nonsense, before each write of layer 0, whatever lies at or beyond the positions written."""

    def write(self, layer, span, keys, values):
        for slot, position in zip(span.slot_of.tolist(), span.positions.tolist(), strict=True):
            self.keys[layer][slot, :, position:] = 1e4
            self.values[layer][slot, :, position:] = -1e4
        super().write(layer, span, keys, values)


@pytest.mark.parametrize("which", ["target", "draft"])
def test_rejected_positions_are_never_read(golden_target, trained, which):
    requests = mixed_requests(golden_target.vocab_size)
    expected = outcomes(engine_of(golden_target, trained, slots=3).generate(requests))
    engine = engine_of(golden_target, trained, slots=3)
    (engine._cache if which == "target" else engine.proposer).store.__class__ = Poisoned
    assert outcomes(engine.generate(requests)) == expected


def test_keys_and_values_stay_where_they_are(golden_target, trained, monkeypatch):
    moves = []
    move = KeyValueStore.move
    monkeypatch.setattr(KeyValueStore, "move", lambda self, *args: (moves.append(args), move(self, *args)))
    engine = engine_of(golden_target, trained, slots=4)
    stores = [engine._cache.store, engine.proposer.store]
    addresses = [tensor.data_ptr() for store in stores for tensor in (*store.keys.values(), *store.values.values())]
    waiting = []

    def still_waiting(index, completion):
        waiting.append(len(moves))

    engine.generate(mixed_requests(golden_target.vocab_size), still_waiting)
    assert [
        tensor.data_ptr() for store in stores for tensor in (*store.keys.values(), *store.values.values())
    ] == addresses
    assert waiting[:8] == [0] * 8  # the slots of these were taken over by waiting requests
    assert 0 < len(moves) <= 2 * 3  # the last ones closed gaps, once in each store
    assert all(length < MAX_LENGTH for _, _, length in moves)


def test_round_lengths_add_up(golden_target, trained):
    for completion, request in zip(
        engine_of(golden_target, trained, slots=4).generate(mixed_requests(golden_target.vocab_size)),
        mixed_requests(golden_target.vocab_size),
        strict=True,
    ):
        rounds = completion.rounds
        assert 1 + sum(r.emitted for r in rounds) == len(completion.output_ids) <= request.max_new_tokens
        assert all(0 <= r.accepted <= r.proposed <= 7 and r.emitted <= r.accepted + 1 for r in rounds)
        assert all(r.emitted == r.accepted + 1 for r in rounds[:-1])
        assert all(len(r.confidences) == r.proposed for r in rounds)
        assert (completion.output_ids[-1] in request.stop_token_ids) == (completion.finish_reason == "stop")
        assert not set(completion.output_ids[:-1]) & set(request.stop_token_ids)


def test_an_accepted_stop_token_has_no_bonus(golden_target, trained):
    prompt = [292, 259, 249, 496, 228, 137, 150, 417, 450, 112, 111, 416]
    engine = engine_of(golden_target, trained)
    free = engine.generate([Request(prompt, 40)])[0]
    emitted, stop = 1, None
    for r in free.rounds:  # a token that is new, drafted and accepted, and not the last accepted one of its round
        for k in range(r.accepted - 1):
            token = free.output_ids[emitted + k]
            if token not in free.output_ids[: emitted + k]:
                stop = stop or (token, k + 1, emitted + k + 1)
        emitted += r.emitted
    token, accepted, length = stop
    stopped = engine.generate([Request(prompt, 40, stop_token_ids=(token,))])[0]
    assert stopped.output_ids == free.output_ids[:length]
    assert stopped.finish_reason == "stop"
    last = stopped.rounds[-1]
    assert (last.proposed, last.accepted, last.emitted) == (accepted, accepted, accepted)


def test_the_last_round_is_clipped(golden_target, trained):
    prompt = [292, 259, 249, 496, 228, 137, 150, 417, 450, 112, 111, 416]
    engine = engine_of(golden_target, trained)
    free = engine.generate([Request(prompt, 40)])[0]
    overshoot = False
    for limit in range(1, 12):
        completion = engine.generate([Request(prompt, limit)])[0]
        assert completion.output_ids == free.output_ids[:limit]
        assert completion.finish_reason == "length"
        assert 1 + sum(r.emitted for r in completion.rounds) == limit
        overshoot |= any(r.emitted < r.accepted + 1 for r in completion.rounds)
    assert overshoot


def test_a_stop_token_or_limit_at_the_first_token(golden_target, trained):
    prompt = [5, 6, 7]
    engine = engine_of(golden_target, trained, slots=2)
    first = engine.generate([Request(prompt, 1)])[0]
    assert (len(first.output_ids), first.rounds, first.finish_reason) == (1, [], "length")
    stopping = Request(prompt, 9, stop_token_ids=tuple(first.output_ids))
    longer = Request([1, 2], 9)
    completions = engine.generate([stopping, stopping, longer, stopping, Request(prompt, 1)])
    assert [c.finish_reason for c in completions] == ["stop", "stop", "length", "stop", "length"]
    assert outcome(completions[2]) == outcome(engine.generate([longer])[0])


def test_a_threshold_of_one_proposes_nothing(golden_target, trained):
    request = Request([3, 4, 5], 12)
    completion = engine_of(golden_target, trained, policy=threshold_of(1.0)).generate([request])[0]
    assert completion.output_ids == engine_of(golden_target, trained).generate([request])[0].output_ids
    assert [(r.proposed, r.accepted, r.emitted) for r in completion.rounds] == [(0, 0, 1)] * 11


def test_progress_is_reported_as_requests_end(golden_target, trained):
    requests = mixed_requests(golden_target.vocab_size)
    reported = {}
    engine = engine_of(golden_target, trained, slots=3)
    completions = engine.generate(requests, reported.__setitem__)
    assert reported == dict(enumerate(completions))
    assert list(reported) != sorted(reported)
    assert min(engine.timing.prefill, engine.timing.draft, engine.timing.verify) > 0
    assert engine.timing.rounds < sum(len(c.rounds) for c in completions)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("where", ["prefill", "round", "draft"])
def test_a_row_with_nan_fails_alone(target, draft, where, temperature, monkeypatch):
    requests = [Request([i, i + 1], 10, temperature, seed=i) for i in range(6)]
    engine = engine_of(target, draft, slots=2)
    expected = engine.generate(requests)
    forward, propose, calls = target.forward, engine.proposer.propose, []

    def failing_forward(*args):
        features, span = forward(*args), current_layout()
        calls.append(1)
        if len(calls) == {"prefill": 1, "round": 3}[where]:
            second = span.slot_of == 1
            engine._cache.store.keys[2][1, :, 1:] = torch.nan
            features.final[0, second.nonzero()[-1]] = torch.nan
            features.context[0, second] = torch.nan
        return features

    def failing_propose(*args):
        proposal = propose(*args)
        calls.append(1)
        if len(calls) == 2 and proposal.probabilities is not None:
            proposal.probabilities[1, 0] = torch.nan
        return proposal

    if where == "draft":
        monkeypatch.setattr(engine.proposer, "propose", failing_propose)
    else:
        monkeypatch.setattr(target, "forward", failing_forward)
    completions = engine.generate(requests)
    failed = [i for i, completion in enumerate(completions) if completion.finish_reason == "error"]
    assert failed == ([] if where == "draft" and temperature == 0 else [1])
    for i, completion in enumerate(completions):
        if i in failed:
            written = completion.output_ids
            assert written == expected[i].output_ids[: len(written)]
        else:
            assert outcome(completion) == outcome(expected[i])


def test_the_targets_attention_is_given_back(target, draft):
    before = target.config._attn_implementation
    engine = engine_of(target, draft)
    engine.generate([Request([1], 2)])
    assert target.config._attn_implementation == before == "sdpa"
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request([1], 2)], lambda index, completion: (_ for _ in ()).throw(KeyboardInterrupt))
    assert target.config._attn_implementation == before


def test_requests_that_cannot_be_decoded(target, draft):
    engine = engine_of(target, draft)
    good = Request([1, 2], 5)
    with pytest.raises(ValueError, match="request 1: the prompt is empty"):
        engine.generate([good, Request([], 5)])
    with pytest.raises(ValueError, match=r"request 0: a prompt of 40 tokens, 20 new ones .* need 65 .* has 64"):
        engine.generate([Request([1] * 40, 20)])
    with pytest.raises(ValueError, match=r"request 0: token ids from 1 to 61, but target .* knows 0 to 60"):
        engine.generate([Request([1, 61], 5)])
    with pytest.raises(ValueError, match="request 1: stop_strings need text; make the engine with decode="):
        engine.generate([good, Request([1, 2], 5, stop_strings=("a",))])
    for settings, message in (
        ({"temperature": -0.1}, "temperature=-0.1: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0: must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1: must be 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"min_p": -0.1}, r"min_p=-0.1: must be 0 \(off\) to 1"),
        ({"min_p": 1.1}, "min_p=1.1: must be 0"),
        ({"min_p": float("nan")}, "min_p=nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0: must be 0.01 to 100 \(1 = off\)"),
        ({"repetition_penalty": -1.2}, "repetition_penalty=-1.2"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"stop_strings": "end"}, "stop_strings='end': must be a tuple of strings that are not empty"),
        ({"stop_strings": ("end", "")}, r"stop_strings=\('end', ''\): must be"),
    ):
        with pytest.raises(ValueError, match=message):
            Request(**({"prompt_ids": [1], "max_new_tokens": 5} | settings))


def test_settings_that_cannot_work(target, draft):
    silent = random_draft(target, confidence_head=False)
    with pytest.raises(ValueError, match=r"ConfidenceThreshold: this draft has no confidence head"):
        engine_of(target, silent, policy=ConfidenceThreshold(0.5, silent.block_size))
    with pytest.raises(ValueError, match=r"decode.verification=tokens: must be one of token, block. Did you mean 'tok"):
        engine_of(target, draft, verification="tokens")
    with pytest.raises(ValueError, match=r"decode.batch_size=0"):
        engine_of(target, draft, slots=0)


def test_drafts_of_another_target(target, draft):
    with pytest.raises(ValueError, match=r"embedding is \[61, 32\].* is \[50, 32\]"):
        DSparkProposer(draft, random_target(vocab_size=50))
    with pytest.raises(ValueError, match=r"embedding is \[61, 32\].* is \[61, 48\]"):
        DSparkProposer(draft, random_target(hidden_size=48))
    other = random_draft(target, target_fingerprint="ab" * 32, target_model_name_or_path="another/target")
    with pytest.raises(ValueError, match=r"trained for target another/target with fingerprint abab"):
        DSparkProposer(other, target)
    shallow = random_target(num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"reads layers up to 4, but target .* has 4"):
        DSparkProposer(draft, shallow)
