"""Statistics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from deepspec.decoding import Round
from deepspec.evaluation.statistics import (
    Pace,
    Resampler,
    cond_accept,
    cond_accept_estimates,
    macro_estimate,
    ratio_estimate,
    reliability,
    speedup_estimate,
    survival,
    tau_of,
    verify_rate,
)

ROUNDS = [
    Round(proposed=3, accepted=3, emitted=4, confidences=[0.9, 0.8, 0.7]),
    Round(proposed=3, accepted=1, emitted=2, confidences=[0.9, 0.3, 0.2]),
    Round(proposed=3, accepted=0, emitted=1, confidences=[0.4, 0.6, 0.6]),
    Round(proposed=2, accepted=2, emitted=2, confidences=[0.9, 0.9]),  # the second token was a stop: no bonus
]


def test_tau_counts_output_tokens_per_round() -> None:
    assert tau_of(ROUNDS) == 9 / 4
    assert tau_of([]) is None


def test_verify_rate_counts_the_extra_position_of_each_pass() -> None:
    assert verify_rate(ROUNDS) == (4 + 2 + 1 + 3) / (4 + 4 + 4 + 3)
    assert verify_rate([]) is None


def test_conditional_acceptance_and_survival_differ() -> None:
    assert cond_accept(ROUNDS, 3) == [3 / 4, 2 / 3, 1 / 1]
    assert survival(ROUNDS, 3) == [3 / 4, 2 / 4, 1 / 3]


def test_conditional_acceptance_by_prompt_has_intervals_and_counts() -> None:
    first, second, third = cond_accept_estimates([ROUNDS[:2], ROUNDS[2:]], 3, Resampler(400))
    assert [first["value"], second["value"], third["value"]] == cond_accept(ROUNDS, 3)
    assert [first["rounds"], second["rounds"], third["rounds"]] == [4, 3, 1]
    assert (first["low"], first["high"]) == (0.5, 1.0)  # one prompt kept both first tokens, the other one of two
    assert cond_accept_estimates([[Round(2, 0, 1, None)]], 2, Resampler(10))[1]["value"] is None


def test_a_slot_that_was_never_proposed_has_no_rate() -> None:
    assert cond_accept(ROUNDS, 4)[3] is None
    assert survival(ROUNDS, 4)[3] is None
    assert cond_accept([Round(2, 0, 1, None)], 2) == [0.0, None]


def test_ratio_interval_agrees_with_normal_theory() -> None:
    rng = np.random.default_rng(3)
    rounds = np.full(400, 10.0)
    tokens = rng.normal(30, 5, 400)  # tau 3, standard deviation 0.5 per prompt
    estimate = ratio_estimate(tokens.tolist(), rounds.tolist(), Resampler(4000, 1))
    assert estimate.value == pytest.approx(tokens.sum() / 4000)
    assert estimate.low is not None
    assert estimate.high is not None
    half = 1.96 * tokens.std() / 10 / 20
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.08)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(11)
    experiments, covered = 400, 0
    for _ in range(experiments):
        skill = rng.beta(6, 3, 60)  # prompts differ: mean acceptance 2/3
        rounds = rng.integers(20, 60, 60)
        tokens = rounds + rng.binomial(rounds, skill)
        estimate = ratio_estimate(tokens.tolist(), rounds.tolist(), Resampler(400))
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 1 + 2 / 3 <= estimate.high
    assert 0.91 <= covered / experiments <= 0.98


def test_long_prompts_weigh_more() -> None:
    assert ratio_estimate([10, 300], [10, 100], Resampler(10)).value == 310 / 110


def test_interval_is_the_same_for_the_same_seed_only() -> None:
    def low(seed: int) -> float | None:
        return ratio_estimate([3, 5, 9, 2], [1, 2, 3, 2], Resampler(200, seed)).low

    assert low(1) == low(1)
    assert len({low(seed) for seed in range(8)}) > 1


def test_nothing_to_count_and_a_single_prompt() -> None:
    assert ratio_estimate([0, 0], [0, 0], Resampler(10)).value is None
    single = ratio_estimate([6], [2], Resampler(10))
    assert (single.value, single.low, single.high) == (3.0, None, None)


def test_macro_is_the_mean_of_sets_with_independent_resamples() -> None:
    # Each set is 1 or 3 per prompt, half and half. The mean of two independent sets has half the variance of one.
    values, ones = [1.0, 3.0] * 100, [1.0] * 200
    one = ratio_estimate(values, ones, Resampler(4000, 5))
    two = macro_estimate([(values, ones), (values, ones)], Resampler(4000, 5))
    assert two.value == 2.0
    assert None not in (one.low, one.high, two.low, two.high)
    assert (two.high - two.low) / (one.high - one.low) == pytest.approx(np.sqrt(0.5), rel=0.1)


def test_macro_ignores_the_size_of_sets() -> None:
    estimate = macro_estimate([([2.0] * 50, [1.0] * 50), ([4.0], [1.0]), ([0.0], [0.0])], Resampler(50))
    assert estimate.value == 3.0


def test_speedup_is_a_ratio_of_token_speeds() -> None:
    pace = Pace([100, 100], [2, 3], [80, 100], [4, 5])  # 40 tokens/s against 20
    assert speedup_estimate([pace], Resampler(100)).value == pytest.approx(2.0)
    assert speedup_estimate([], Resampler(100)).value is None


def test_a_machine_that_slows_down_does_not_widen_the_paired_speedup() -> None:
    slow = np.array([1.0, 1.0, 5.0, 1.0, 9.0, 2.0])
    tokens = [50.0] * 6
    estimate = speedup_estimate([Pace(tokens, slow.tolist(), tokens, (2 * slow).tolist())], Resampler(500))
    assert estimate.low == pytest.approx(2.0)
    assert estimate.high == pytest.approx(2.0)


def test_reliability_uses_slots_whose_earlier_tokens_were_accepted() -> None:
    result = reliability(ROUNDS, bins=10)
    assert result is not None
    # (0.9, 0.8, 0.7: kept), (0.9 kept, 0.3 not), (0.4 not), (0.9, 0.9 kept)
    assert result["slots"] == 8
    assert result["auc"] == 1.0
    by_low = {round(row["low"], 1): row for row in result["bins"]}
    assert by_low[0.9]["count"] == 4
    assert by_low[0.9]["observed"] == 1.0
    assert by_low[0.3]["observed"] == 0.0
    assert result["ece"] == pytest.approx((4 * 0.1 + 0.2 + 0.3 + 0.3 + 0.4) / 8)
    first, second, third = result["positions"]
    assert [first["slots"], second["slots"], third["slots"]] == [4, 3, 1]
    assert (first["predicted"], first["observed"]) == (pytest.approx(3.1 / 4), 3 / 4)
    assert first["ece"] == pytest.approx((3 * 0.1 + 0.4) / 4)
    assert first["auc"] == second["auc"] == 1.0
    assert (third["k"], third["observed"], third["auc"]) == (3, 1.0, None)


def test_reliability_of_drafts_without_confidences_and_of_one_outcome() -> None:
    assert reliability([Round(2, 1, 2, None)]) is None
    certain = reliability([Round(1, 1, 2, [1.0])])
    assert certain is not None
    assert certain["auc"] is None
    assert certain["bins"][-1]["high"] == 1.0
