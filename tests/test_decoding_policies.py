"""Verification policies against a literal transcription of the paper's algorithm, and what must always hold."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.config import ConfigError
from deepspec.decoding.policies import (
    POLICIES,
    AsynchronousScheduler,
    Calibrated,
    ConfidenceThreshold,
    FixedLength,
    Pausing,
    PolicySetup,
    PrefixScheduler,
    build_policy,
    calibrated,
)
from deepspec.decoding.scheduling import Ranking, RoundCost, best_places, places_until_first_drop, survivals
from deepspec.decoding.sps import SpsTable

TABLE = SpsTable([1, 8, 64], [100.0, 90.0, 20.0])


class GivenCost(RoundCost):
    """Seconds of a round of `rows` that verifies n = 0, 1, ... tokens, as they were drawn."""

    rows, _block_size = 5, 5

    def __init__(self, seconds):
        self._seconds = torch.tensor(seconds, dtype=torch.float64)

    def seconds(self, rows: int, slots: int) -> torch.Tensor:
        return self._seconds[: rows * slots + 1]


@st.composite
def rounds(draw, grid: int = 8):
    """Confidences [rows, slots] and seconds for n = 0..rows * slots; multiples of 1/8, so float64 makes no error."""
    rows, slots = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    eighths = st.integers(0, grid).map(lambda i: i / grid)
    confidences = draw(st.lists(st.lists(eighths, min_size=slots, max_size=slots), min_size=rows, max_size=rows))
    steps = draw(st.lists(st.integers(0, 12), min_size=rows * slots, max_size=rows * slots))
    seconds = [draw(st.integers(1, 24))]
    for step in steps:
        seconds.append(seconds[-1] + step)
    return torch.tensor(confidences, dtype=torch.float64), [s / 8 for s in seconds]


def convex(seconds: list[float]) -> list[float]:
    """The same steps of time, smallest first."""
    result = seconds[:1]
    for step in sorted(b - a for a, b in pairwise(seconds)):
        result.append(result[-1] + step)
    return result


def scheduled(confidences, seconds) -> torch.Tensor:
    return PrefixScheduler(GivenCost(seconds), confidences.shape[1]).lengths(confidences, len(confidences))


def algorithm_1(confidences: list[list[float]], seconds: list[float], *, early_stop: bool = True) -> list[int]:
    """The paper's algorithm 1, word by word, in exact arithmetic; or the best of all prefixes of the ranking."""
    candidates = []
    for row, values in enumerate(confidences):
        survival = Fraction(1)
        for slot, value in enumerate(values):
            survival *= Fraction(value)
            candidates.append((-survival, slot, row))
    tau, lengths = Fraction(len(confidences)), [0] * len(confidences)
    best, best_lengths = tau / Fraction(seconds[0]), list(lengths)
    for places, (negative, _, row) in enumerate(sorted(candidates), start=1):
        tau -= negative
        lengths[row] += 1
        throughput = tau / Fraction(seconds[places])
        if throughput > best:
            best, best_lengths = throughput, list(lengths)
        elif early_stop:
            break
    return best_lengths


@settings(deadline=None, max_examples=200)
@given(rounds())
def test_the_scheduler_is_algorithm_1(case):
    confidences, seconds = case
    assert scheduled(confidences, seconds).tolist() == algorithm_1(confidences.tolist(), seconds)


@settings(deadline=None, max_examples=100)
@given(rounds())
def test_the_unconstrained_search_finds_the_best_of_all(case):
    confidences, seconds = case
    ranking = Ranking.of(confidences)
    places = best_places(ranking.throughput(GivenCost(seconds).seconds(*confidences.shape)))
    assert ranking.lengths(places).tolist() == algorithm_1(confidences.tolist(), seconds, early_stop=False)


@settings(deadline=None, max_examples=100)
@given(rounds())
def test_every_row_gets_a_prefix_and_nobody_with_more_survival_is_passed_over(case):
    confidences, seconds = case
    lengths = scheduled(confidences, seconds)
    rows, slots = confidences.shape
    assert ((lengths >= 0) & (lengths <= slots)).all()
    admitted = torch.arange(slots) < lengths[:, None]
    survival = survivals(confidences)
    inside, outside = survival[admitted].tolist(), survival[~admitted].tolist()
    assert min(inside, default=1.0) >= max(outside, default=0.0)
    assert all(value > 0 for value in inside)
    throughput = Ranking.of(confidences).throughput(GivenCost(seconds).seconds(rows, slots))
    assert (throughput[: int(lengths.sum()) + 1].diff() > 0).all()


@settings(deadline=None, max_examples=100)
@given(rounds())
def test_where_each_further_token_costs_no_less_the_first_drop_is_the_best_of_all(case):
    confidences, seconds = case
    throughput = Ranking.of(confidences).throughput(GivenCost(convex(seconds)).seconds(*confidences.shape))
    assert places_until_first_drop(throughput) == best_places(throughput)


@settings(deadline=None, max_examples=100)
@given(rounds(), st.data())
def test_more_confidence_never_shortens_a_row(case, data):
    """Where each further token costs no less than the one before; a cliff may stop the ranking earlier."""
    confidences, seconds = case
    row, slot = (data.draw(st.integers(0, size - 1)) for size in confidences.shape)
    raised = confidences.clone()
    raised[row, slot] = data.draw(st.integers(int(8 * confidences[row, slot]), 8)) / 8
    before, after = scheduled(confidences, convex(seconds)), scheduled(raised, convex(seconds))
    assert after[row] >= before[row]
    for threshold in (0.25, 0.5, 1.0):
        policy = ConfidenceThreshold(threshold, confidences.shape[1])
        assert (policy.lengths(raised, len(raised)) >= policy.lengths(confidences, len(raised))).all()


def every_policy(seconds, slots: int):
    yield FixedLength(slots)
    yield ConfidenceThreshold(0.5, slots)
    yield PrefixScheduler(GivenCost(seconds), slots)


@settings(deadline=None, max_examples=200)
@given(rounds(), st.data())
def test_a_token_is_not_judged_by_what_follows_it(case, data):
    """What makes a policy lossless: new confidences after slot j leave the first j places of that row alone."""
    confidences, seconds = case
    rows, slots = confidences.shape
    row, slot = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(1, slots))
    other = confidences.clone()
    for later in range(slot, slots):
        other[row, later] = data.draw(st.integers(0, 8)) / 8
    for policy in every_policy(seconds, slots):
        first, second = (policy.lengths(values, rows)[row].clamp(max=slot) for values in (confidences, other))
        assert first == second
    for places in range(rows * slots + 1):  # the asynchronous one: a number of places that earlier rounds chose
        first, second = (Ranking.of(values).lengths(places)[row].clamp(max=slot) for values in (confidences, other))
        assert first == second


def test_the_unconstrained_search_judges_a_token_by_what_follows_it():
    cost = GivenCost([1.0, 2.0, 1 / 0.45]).seconds(1, 2)
    lengths = [
        int(best_places(Ranking.of(torch.tensor([[0.8, after]])).throughput(cost)).clamp(max=1)) for after in (0.9, 0.1)
    ]
    assert lengths == [1, 0]


@pytest.mark.parametrize("name", ["prefix", "threshold"])
def test_a_row_without_confidence_gets_no_place_and_the_others_theirs(name):
    policy = build_policy(name, setup(confidence_threshold=0.5 if name == "threshold" else 0.0))
    confidences = torch.full((4, 5), 0.9)
    confidences[1], confidences[2] = 0.0, torch.nan
    lengths = policy.lengths(confidences, 4)
    assert lengths[1] == lengths[2] == 0
    assert lengths[0] > 0
    assert lengths[3] > 0
    assert policy.lengths(torch.zeros(4, 5), 4).tolist() == [0] * 4


def test_survival_never_rises_even_where_the_product_is_built_in_another_order(monkeypatch):
    rising = torch.tensor([[0.5, 0.5 + 1e-9, 0.25]], dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "cumprod", lambda self, dim: rising)
    assert survivals(torch.ones(1, 3)).tolist() == [[0.5, 0.5, 0.25]]


def test_ties_go_to_earlier_slots_first():
    ranking = Ranking.of(torch.ones(3, 2))
    assert [ranking.lengths(places).tolist() for places in range(7)] == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [2, 1, 1],
        [2, 2, 1],
        [2, 2, 2],
    ]


def test_the_scheduler_verifies_less_the_more_rows_share_the_pass():
    policy = build_policy("prefix", setup(rows=32))
    confidences = torch.full((32, 5), 0.7)
    per_row = [policy.lengths(confidences[:rows], rows).double().mean().item() for rows in (1, 8, 32)]
    assert per_row[0] > per_row[1] > per_row[2]


def test_what_a_round_costs_besides_its_pass_makes_more_tokens_worthwhile():
    bare = SpsTable([1, 64], [100.0, 20.0])
    drafting = SpsTable([1, 64], [100.0, 20.0], rows=[1, 32], draft_seconds=[0.05, 0.2])
    confidences = torch.full((8, 5), 0.6)
    lengths = [build_policy("prefix", setup(sps=table)).lengths(confidences, 8).sum() for table in (bare, drafting)]
    assert lengths[1] > lengths[0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=6, max_size=6), st.integers(1, 3))
def test_the_asynchronous_scheduler_takes_its_places_from_two_rounds_ago(history, slots):
    policy = build_policy("asynchronous", setup(block_size=slots, rows=3))
    chosen = []
    for turn, eighths in enumerate(history):
        rows = 1 + turn % 3
        confidences = torch.tensor(eighths)[:rows, None].expand(-1, slots) / 8
        total = policy.known_total(rows)
        assert total == (rows * slots if turn < 2 else min(chosen[turn - 2], rows * slots))
        lengths = policy.lengths(confidences, rows)
        assert lengths.sum() == total
        assert torch.equal(lengths, Ranking.of(confidences).lengths(total))
        cost = torch.as_tensor(TABLE.pass_seconds([rows + n for n in range(rows * slots + 1)]))
        chosen.append(int(best_places(Ranking.of(confidences).throughput(cost))))
    policy.reset()
    assert policy.known_total(2) == 2 * slots


def test_a_threshold_ends_at_the_first_token_below_it():
    confidences = torch.tensor([[0.9, 0.5, 0.8], [0.4, 0.9, 0.9], [0.5, 0.6, 0.4]])
    assert ConfidenceThreshold(0.5, 3).lengths(confidences, 3).tolist() == [3, 0, 2]
    assert ConfidenceThreshold(0.0, 3).lengths(confidences, 3).tolist() == [3, 3, 3]


@pytest.mark.parametrize(("draft_tokens", "expected"), [(None, 5), (0, 0), (1, 1), (5, 5)])
def test_a_fixed_length_needs_no_confidences(draft_tokens, expected):
    policy = build_policy("fixed", setup(draft_tokens=draft_tokens, has_confidences=False, sps=None))
    assert policy.maximum == expected
    assert policy.known_total(3) == 3 * expected
    assert policy.lengths(None, 3).tolist() == [expected] * 3


class PlainCost(GivenCost):
    """A plain round takes a second for each row."""

    def plain_seconds(self, rows: int) -> float:
        return float(rows)


def pausing(draft_seconds: float) -> Pausing:
    """Two slots; a round takes a second per row more for drafting, and a verified token nothing."""
    cost = PlainCost([1 + draft_seconds] * 3)
    return Pausing(FixedLength(2), cost)


def rounds_of(policy: Pausing, confidences: list[float | None]) -> str:
    """Of one row whose drafts would have these confidences: d where it drafts, p where the round is plain."""
    made = ""
    for confidence in confidences:
        drafts = policy.to_draft(1) > 0
        made += "d" if drafts else "p"
        if drafts:
            policy.lengths(torch.full((1, 2), confidence), 1)
    return made


def test_a_policy_pauses_while_drafts_do_not_pay():
    assert rounds_of(pausing(1.0), [1.0] * 20) == "d" * 20  # three tokens in two seconds
    pauses = [1, 2, 4, 8, 16, 16]
    expected = "".join("d" + "p" * pause for pause in pauses)
    assert rounds_of(pausing(1.0), [0.1] * len(expected)) == expected
    assert pausing(1.0).to_draft(1) == 2


def test_a_pause_ends_when_drafts_pay_again():
    policy = pausing(1.0)
    assert rounds_of(policy, [0.1] * 11) == "dpdppdppppd"
    assert rounds_of(policy, [1.0] * 30) == "p" * 8 + "d" * 22
    policy.reset()
    assert rounds_of(policy, [0.1] * 4) == "dpdp"


def test_new_requests_shorten_a_pause_by_their_share():
    def after(new: int, rows: int) -> str:
        policy = pausing(1.0)
        rounds_of(policy, [0.1] * 11)  # 8 plain rounds would follow
        policy.to_draft(1)  # the first
        policy.enter(new, rows)
        return rounds_of(policy, [0.1] * 8).split("d")[0]

    assert [after(0, 4), after(1, 7), after(4, 7), after(1, 1)] == ["p" * 7, "p" * 6, "p" * 3, ""]


def test_one_round_that_does_not_pay_is_not_enough():
    """0.75 of the mean of earlier rounds, 1.5, and 0.25 of 0.5 are above 1."""
    policy = pausing(1.0)
    assert rounds_of(policy, [1.0, 0.0, 1.0, 1.0]) == "dddd"
    assert rounds_of(policy, [0.0, 0.0, 0.0]) == "ddp"


@pytest.mark.parametrize("name", ["prefix", "asynchronous"])
def test_a_scheduler_pauses_where_the_table_knows_what_drafting_takes(name):
    assert not isinstance(build_policy(name, setup()), Pausing)
    costly = SpsTable([1, 64], [100.0, 100.0], [1, 8], [0.02, 0.02])
    policy = build_policy(name, setup(sps=costly, temperatures=[1.0] * 5))
    assert policy.to_draft(2) == 5
    policy.lengths(torch.full((2, 5), 0.5), 2)  # 4 tokens in 0.03 s, plain 2 in 0.01 s
    assert policy.to_draft(2) == 0
    policy.reset()
    assert policy.to_draft(2) == 5


def test_calibration_divides_the_logits():
    confidences = torch.tensor([[0.5, 0.9, 0.2, 0.0, 1.0]])
    assert torch.allclose(calibrated(confidences, torch.ones(5)), confidences)
    soft = calibrated(confidences, torch.full((5,), 2.0))
    assert torch.allclose(soft, torch.tensor([[0.5, 0.75, 1 / 3, 0.0, 1.0]]))
    sharp = calibrated(soft, torch.full((5,), 0.5))
    assert torch.allclose(sharp, confidences)


def test_a_policy_sees_calibrated_confidences():
    policy = build_policy("threshold", setup(confidence_threshold=0.7, temperatures=[2.0, 1.0, 1.0, 1.0, 0.5]))
    assert isinstance(policy, Calibrated)
    assert policy.maximum == 5
    assert policy.known_total(1) is None
    lengths = policy.lengths(torch.tensor([[0.9, 0.8, 0.8, 0.8, 0.6], [0.8, 0.9, 0.9, 0.9, 0.9]]), 2)
    assert lengths.tolist() == [4, 0]  # 0.9 -> 0.75, 0.6 -> 0.69; 0.8 -> 0.67
    waiting = build_policy("asynchronous", setup(temperatures=[1.0] * 5))
    for _ in range(2):
        waiting.lengths(torch.rand(4, 5), 4)
    places = waiting.known_total(4)
    waiting.reset()
    assert places < waiting.known_total(4) == 20


def setup(**changes) -> PolicySetup:
    values = {"block_size": 5, "rows": 8, "has_confidences": True, "sps": TABLE}
    return PolicySetup(**(values | changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("prefx", {}, r"decode.policy=prefx: must be one of fixed, .* Did you mean 'prefix'\?"),
        ("prefix", {"sps": None}, "decode.policy=prefix: needs an SPS table; measure one with .*decoding.profile"),
        ("asynchronous", {"sps": None}, "decode.policy=asynchronous: needs an SPS table"),
        ("prefix", {"has_confidences": False}, "decode.policy=prefix: this draft has no confidence head"),
        ("threshold", {"has_confidences": False}, "decode.policy=threshold: this draft has no confidence head"),
        ("fixed", {"draft_tokens": 6}, "decode.draft_tokens=6: must be from 0 to 5; this draft proposes 5"),
        ("fixed", {"draft_tokens": 1, "block_size": 0}, "decode.draft_tokens=1: .* there is no draft"),
        ("prefix", {"draft_tokens": 1}, "decode.draft_tokens=1: only decode.policy=fixed"),
        ("fixed", {"confidence_threshold": 0.5}, "decode.confidence_threshold=0.5: only decode.policy=threshold"),
        ("prefix", {"temperatures": [1.0] * 7}, "7 calibration temperatures for a block of 5"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_policy(name, setup(**changes))


def test_every_registered_policy_can_be_built():
    for name in POLICIES:
        policy = build_policy(name, setup())
        assert policy.lengths(torch.rand(3, 5), 3).shape == (3,)
    assert isinstance(build_policy("asynchronous", setup()), AsynchronousScheduler)
