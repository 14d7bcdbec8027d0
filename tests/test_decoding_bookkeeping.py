"""What is always true of the engine's pieces: spans, lengths, caches, places; and the order of `submit` and `step`."""

from __future__ import annotations

import pytest
import torch
from decoding_world import random_draft, random_target
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.decoding import DSparkProposer, Request, SpeculativeEngine
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.passes import target_pass
from deepspec.decoding.policies import POLICIES, PolicySetup, build_policy
from deepspec.decoding.span import Span
from deepspec.decoding.sps import SpsTable
from deepspec.targets.attention import current_layout

BLOCK, MAX_LENGTH = 3, 48
TABLE = SpsTable([1, 8, 16], [1.0, 1 / 1.5, 1 / 3])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target():
    return random_target(num_hidden_layers=3)


@pytest.fixture(scope="module")
def draft(target):
    return random_draft(target, block_size=BLOCK, target_layer_ids=[0, 1])


def policy_of(name: str, slots: int):
    threshold = 0.55 if name == "threshold" else 0.0
    return build_policy(
        name, PolicySetup(BLOCK, slots, has_confidences=True, confidence_threshold=threshold, sps=TABLE)
    )


def engine_of(target, draft, *, slots: int, policy: str = "fixed", **options) -> SpeculativeEngine:
    proposer = DSparkProposer(draft, target)
    return SpeculativeEngine(
        target, proposer, slots=slots, max_length=MAX_LENGTH, policy=policy_of(policy, slots), **options
    )


@st.composite
def spans(draw):
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    starts = [draw(st.integers(0, 20)) for _ in counts]
    return starts, counts, draw(st.integers(0, 4)), draw(st.integers(0, 3))


@settings(deadline=None, max_examples=100)
@given(spans())
def test_a_span_lays_out_and_packs_again(case):
    """With a total beyond the sum, a bound beyond the longest row."""
    starts, counts, beyond, wider = case
    total, longest = sum(counts) + beyond, max(counts) + wider
    slots = list(range(3, 3 + len(counts)))
    end = max(start + count for start, count in zip(starts, counts, strict=True))
    span = Span(slots, torch.tensor(starts), torch.tensor(counts), total=total, longest=longest, end=end)
    expected = [(slot, start + i) for slot, start, n in zip(slots, starts, counts, strict=True) for i in range(n)]
    expected += expected[-1:] * beyond
    assert list(zip(span.slot_of.tolist(), span.positions.tolist(), strict=True)) == expected
    assert int(span.positions.max()) < end
    packed = torch.arange(2 * total).view(total, 2)
    packed[sum(counts) :] = packed[sum(counts) - 1]
    rows = span.to_rows(packed)
    assert rows.shape == (len(counts), longest, 2)
    assert torch.equal(span.to_packed(rows), packed)
    for row, slot, count in zip(rows, slots, counts, strict=True):
        own = packed[: sum(counts)][span.slot_of[: sum(counts)] == slot]
        assert torch.equal(row[:count], own)
        assert (row[count:] == own[-1]).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_a_span_of_equal_counts_is_the_one_that_names_them(count, starts):
    rows = len(starts)
    sizes = {"total": rows * count, "longest": count, "end": max(starts) + count}
    same = Span(range(rows), torch.tensor(starts), count, **sizes)
    named = Span(range(rows), torch.tensor(starts), torch.full((rows,), count), **sizes)
    assert torch.equal(same.positions, named.positions)
    assert torch.equal(same.slot_of, named.slot_of)
    packed = torch.rand(rows * count, 2)
    assert torch.equal(same.to_rows(packed), named.to_rows(packed))
    assert torch.equal(same.to_packed(same.to_rows(packed)), packed)
    made = Span.of(range(rows), starts, [count] * rows, CPU)
    assert torch.equal(made.positions, same.positions)


def stored(store, slot: int, length: int) -> torch.Tensor:
    return torch.stack([tensor[slot, :, :length] for tensor in (*store.keys.values(), *store.values.values())])


@torch.inference_mode()
def fresh_caches(target, draft, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of target and draft from one pass over all these tokens."""
    cache, proposer = SlotCache(target, 1, MAX_LENGTH, 1), DSparkProposer(draft, target)
    proposer.allocate(1, MAX_LENGTH)
    span = Span.of([0], [0], [len(tokens)], CPU)
    target_pass(target, proposer, cache, span, torch.tensor(tokens), is_certain=True)
    return stored(cache.store, 0, len(tokens)), stored(proposer.store, 0, len(tokens))


def check_rows(engine) -> None:
    for row in engine._rows:
        if row is not None:
            output = row.completion.output_ids
            assert row.length == len(row.request.prompt_ids) + len(output) - 1
            assert row.anchor == output[-1]
            assert row.length + engine.block_size < engine.max_length
            rounds = row.completion.rounds
            assert 1 + sum(r.emitted for r in rounds) == len(output)
            assert all(0 <= r.accepted <= r.proposed <= engine.block_size for r in rounds)
            assert all(r.emitted == r.accepted + 1 for r in rounds)


requests_drawn = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 20), st.sampled_from([0.0, 1.0]), st.integers(0, 6)),
    min_size=2,
    max_size=6,
)


@settings(deadline=None, max_examples=8)
@given(requests_drawn, st.sampled_from(list(POLICIES)), st.booleans(), st.integers(1, 4), st.integers(0, 99))
def test_lengths_and_caches_after_every_round(target, draft, drawn, policy, graphs, slots, seed):
    """Requests that come at any step; the caches hold what a fresh pass over the same tokens writes."""
    engine = engine_of(target, draft, slots=slots, policy=policy, graphs=graphs, verification="block")
    generator = torch.Generator().manual_seed(seed)
    coming = [
        (step, Request(torch.randint(0, 61, (length,), generator=generator).tolist(), limit, temperature, seed=step))
        for length, limit, temperature, step in drawn
    ]
    submitted, ended, steps, checked = [], [], 0, 0
    while coming or engine.active or engine.waiting:
        for entry in [entry for entry in coming if entry[0] <= steps]:
            submitted.append((engine.submit(entry[1]), entry[1]))
            coming.remove(entry)
        before = engine.active + engine.waiting
        done = engine.step()
        ended += done
        steps += 1
        assert engine.active <= slots
        assert engine.active + engine.waiting + len(done) == before
        check_rows(engine)
        if steps % 5 == 0 or not coming:
            for slot, row in enumerate(engine._rows):
                if row is not None and checked < 8:
                    tokens = (row.request.prompt_ids + row.completion.output_ids)[: row.length]
                    of_target, of_draft = fresh_caches(target, draft, tokens)
                    for store, fresh in ((engine._cache.store, of_target), (engine.proposer.store, of_draft)):
                        torch.testing.assert_close(stored(store, slot, row.length), fresh, atol=1e-5, rtol=1e-5)
                    checked += 1
    assert sorted(number for number, _ in ended) == [number for number, _ in submitted]
    for number, completion in ended:
        request = dict(submitted)[number]
        assert len(completion.output_ids) == request.max_new_tokens
        assert completion.finish_reason == "length"


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", ["threshold", "prefix", "asynchronous"])
def test_a_pass_never_holds_more_than_its_capacity(target, draft, policy, graphs, monkeypatch):
    """What the target computes is one token a row and as many drafted ones as the policy has given places."""
    engine = engine_of(target, draft, slots=4, policy=policy, graphs=graphs)
    forward, lengths = target.forward, engine.policy.lengths
    decided, computed = [], []

    def counted(confidences, rows):
        decided.append((rows, lengths(confidences, rows)))
        return decided[-1][1]

    def seen(*args):
        span = current_layout()
        if span.longest <= 1 + BLOCK and decided:
            computed.append(span.total)
        return forward(*args)

    monkeypatch.setattr(engine.policy, "lengths", counted)
    monkeypatch.setattr(target, "forward", seen)
    completions = engine.generate([Request([i + 1] * 9, 14, temperature=1.0, seed=i) for i in range(4)])
    assert all(((chosen >= 0) & (chosen <= BLOCK)).all() for _, chosen in decided)
    proposed = sum(r.proposed for completion in completions for r in completion.rounds)
    assert proposed == sum(int(chosen.sum()) for _, chosen in decided)
    assert max(computed) <= 4 * (1 + BLOCK)
    if not graphs:
        assert computed == [rows + int(chosen.sum()) for rows, chosen in decided]


@pytest.mark.parametrize("policy", ["threshold", "prefix", "asynchronous"])
def test_a_request_without_confidence_makes_a_token_a_round(target, draft, policy, monkeypatch):
    engine = engine_of(target, draft, slots=2, policy=policy)
    propose = engine.proposer.propose

    def hopeless(*args):
        proposal = propose(*args)
        proposal.confidences[0] = 0.0
        proposal.confidences[1:] = 1.0
        return proposal

    monkeypatch.setattr(engine.proposer, "propose", hopeless)
    engine.submit(Request([1, 2], 12))
    engine.submit(Request([3, 4], 30))
    lengths = []
    while engine._rows[:1] != [None]:
        engine.step()
        lengths += [len(row.completion.output_ids) for row in engine._rows[:1] if row]
    assert lengths == sorted(set(lengths))
    if policy != "asynchronous":
        assert lengths == list(range(1, 12))


def test_requests_are_served_in_order_and_reported_when_they_end(target, draft):
    engine = engine_of(target, draft, slots=2)
    assert (engine.step(), engine.active, engine.waiting) == ([], 0, 0)
    numbers = [engine.submit(Request([i + 1], limit)) for i, limit in enumerate((1, 14, 2, 1, 3))]
    assert numbers == [0, 1, 2, 3, 4]
    assert (engine.active, engine.waiting) == (0, 5)
    assert [number for number, _ in engine.step()] == [0]  # its only token came from the prefill pass
    assert (engine.active, engine.waiting) == (1, 3)
    assert engine.step() == []  # 2 enters beside 1
    assert (engine.active, engine.waiting) == (2, 2)
    assert [number for number, _ in engine.step()] == [2]
    assert [number for number, _ in engine.step()] == [3]
    order = []
    while engine.active or engine.waiting:
        order += [number for number, _ in engine.step()]
    assert order == [4, 1]
    assert engine.submit(Request([1], 1)) == 5


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_engine_goes_on_after_an_interruption(target, draft, policy, graphs):
    engine = engine_of(target, draft, slots=3, policy=policy, graphs=graphs)
    requests = [Request([i + 1, 5], 3 + 4 * i) for i in range(7)]
    expected = [completion.output_ids for completion in engine.generate(requests)]
    penalised = [Request([i + 1, 5], 9, temperature=1.0, repetition_penalty=1.3, seed=i) for i in range(5)]

    def interrupt(index, completion):
        if index == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([*requests[:4], *penalised], interrupt)
    assert engine.active == engine.waiting == 0  # an interrupted call forgets its requests
    indices = []
    completions = engine.generate(requests, lambda index, completion: indices.append(index))
    assert [completion.output_ids for completion in completions] == expected
    assert sorted(indices) == list(range(7))
    assert (engine.active, engine.waiting) == (0, 0)
