"""Sequential temperature scaling on rounds of known calibration, and what it refuses to learn from."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from decoding_world import random_draft, random_target
from scipy.special import expit, logit

from deepspec.arguments import parse_arguments
from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.decoding import Completion, Round
from deepspec.decoding.calibrate import CalibrateOptions
from deepspec.decoding.calibrate import main as calibrate_main
from deepspec.decoding.calibration import (
    RecordedRounds,
    calibrate,
    fit_temperatures,
    held_out_survival,
    load_calibration,
    predicted_survival,
)
from deepspec.decoding.recorded_rounds import read_source
from deepspec.decoding.reliability import calibration_error, reliability_bins, trust
from deepspec.evaluation.records import Decoding, Record, RecordStore
from deepspec.files import sha256_of

TRUE = [0.5, 1.7, 2.5, 0.7]


def simulated(count: int, temperatures: list[float], seed: int = 0) -> RecordedRounds:
    """Rounds of a head whose logits are `temperatures` times too large."""
    generator = np.random.default_rng(seed)
    slots = len(temperatures)
    truth = 1.2 + 1.5 * generator.standard_normal((count, slots))
    kept = generator.random((count, slots)) < expit(truth)
    return RecordedRounds(
        expit(truth * temperatures),
        np.full(count, slots),
        np.cumprod(kept, axis=1).sum(1),
        np.arange(count) // 20,
    )


@pytest.fixture(scope="module")
def rounds() -> RecordedRounds:
    return simulated(60_000, TRUE)


def test_the_temperatures_are_recovered_and_survival_becomes_true(rounds):
    calibration = calibrate(rounds)
    assert np.log(calibration.temperatures) == pytest.approx(np.log(TRUE), abs=0.12)
    assert calibration.mean_ece["before"] > 0.04
    assert calibration.mean_ece["after"] < 0.01
    assert calibration.mean_ece["held_out"] < 0.015
    for position in calibration.positions:
        assert position["rounds"] == 60_000
        assert position["after"]["ece"] < position["before"]["ece"]
        assert position["after"]["predicted"] == pytest.approx(position["observed"], abs=0.01)
        assert position["after"]["auc"] >= position["before"]["auc"] - 0.005


def test_a_true_head_is_left_alone():
    assert fit_temperatures(simulated(60_000, [1.0] * 3, seed=1)) == pytest.approx([1.0] * 3, rel=0.06)


def test_later_slots_do_not_move_earlier_temperatures(rounds):
    first_two = replace(rounds, confidences=rounds.confidences[:, :2])
    assert fit_temperatures(first_two) == fit_temperatures(rounds)[:2]


def test_where_the_error_does_not_tell_temperatures_apart_one_is_kept():
    hopeless = simulated(2000, [1.0, 1.0])
    hopeless.confidences[:, 0] = 1e-6
    assert fit_temperatures(replace(hopeless, accepted=np.zeros_like(hopeless.accepted)))[1] == 1.0


def test_rounds_that_ended_early_count_as_far_as_they_went(rounds):
    cut = replace(rounds, confidences=rounds.confidences.copy(), proposed=rounds.proposed.copy())
    stopped = (rounds.accepted >= 2) & (rounds.prompts % 3 == 0)  # a stop token was accepted in slot 2
    cut.confidences[stopped, 2:] = np.nan
    cut.proposed[stopped] = 2
    cut = replace(cut, accepted=np.minimum(cut.accepted, cut.proposed))
    calibration = calibrate(cut)
    assert calibration.temperatures[:2] == fit_temperatures(rounds)[:2]
    assert [position["rounds"] for position in calibration.positions] == [60_000] * 2 + [60_000 - stopped.sum()] * 2
    assert all(np.isfinite(position["after"]["ece"]) for position in calibration.positions)


def test_held_out_predictions_come_from_the_other_prompts():
    odd, even = simulated(20_000, [3.0], seed=2), simulated(20_000, [1.0], seed=3)
    both = RecordedRounds(
        np.concatenate([odd.confidences, even.confidences]),
        np.concatenate([odd.proposed, even.proposed]),
        np.concatenate([odd.accepted, even.accepted]),
        np.concatenate([2 * odd.prompts + 1, 2 * even.prompts]),
    )
    held_out = held_out_survival(both)
    of_odd, of_even = fit_temperatures(odd), fit_temperatures(even)
    assert of_odd[0] > 2 > 1.2 > of_even[0]
    assert np.array_equal(held_out[:20_000], predicted_survival(odd.confidences, of_even))
    assert np.array_equal(held_out[20_000:], predicted_survival(even.confidences, of_odd))


def test_survival_is_the_product_of_scaled_confidences():
    given = np.array([[0.5, 0.9, 0.2], [1.0, 0.0, 0.3]])
    expected = np.cumprod([[0.5, 0.75, expit(logit(0.2) / 0.5)], [1.0, 0.0, 0.0]], axis=1)
    with np.errstate(all="raise", divide="ignore"):
        assert predicted_survival(given, [3.0, 2.0, 0.5]) == pytest.approx(expected)


def test_calibration_error_by_hand():
    predicted, observed = np.array([0.05, 0.08, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    low, high = reliability_bins(predicted, observed, 10)
    assert (low["count"], low["predicted"], low["observed"]) == (2, pytest.approx(0.065), 0.5)
    assert (high["low"], high["high"], high["observed"]) == (0.9, 1.0, 1.0)
    assert calibration_error(predicted, observed, 10) == pytest.approx((2 * 0.435 + 2 * 0.025) / 4)
    assert trust(predicted, observed, 10)["auc"] == 1.0
    assert trust(predicted, np.ones(4), 10)["auc"] is None


@pytest.fixture
def world(tmp_path):
    """A draft, its calibration split beside an evaluation set, and an evaluation of the split."""
    random_draft(random_target(), block_size=4).save_pretrained(tmp_path / "draft")
    for name in ("calibration_math", "math"):
        lines = [json.dumps({"turns": [f"{name} {number}"]}) for number in range(4)]
        (tmp_path / "prompts").mkdir(exist_ok=True)
        (tmp_path / "prompts" / f"{name}.jsonl").write_text("\n".join(lines))
    metrics = {
        "draft": {"weights": {"model.safetensors": sha256_of(tmp_path / "draft/model.safetensors")}, "block_size": 4},
        "settings": {"eval.prompts_dir": str(tmp_path / "prompts"), "decode.verification": "token"},
        "settings_digest": "now",
        "command": "python eval.py",
    }
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def full(accepted: int, confidence: float = 0.5) -> Round:
    return Round(4, accepted, accepted + 1, [confidence] * 4)


def record(world, completions: list[Completion], set_name: str = "calibration_math", temperature: float = 1.0) -> None:
    stored = Record(set_name, temperature, 0, "digest", Decoding(1.0, completions), None)
    store = RecordStore(world / "eval", "now")
    store.consolidate([*store.read()[0].values(), stored])


def read(world, **options):
    return read_source(world / "eval", world / "draft", **options)


def test_rounds_are_read_with_their_prompts(world):
    record(world, [Completion([1] * 9, [full(3, 0.9), full(1)], "length"), Completion([1] * 5, [full(4)], "length")])
    record(world, [Completion([1], [Round(2, 2, 2, [0.7, 0.6])], "stop"), Completion([], [], "error")], temperature=0.0)
    source = read(world)
    assert source.rounds.accepted.tolist() == [2, 3, 1, 4]
    assert source.rounds.proposed.tolist() == [2, 4, 4, 4]
    assert source.rounds.prompts.tolist() == [0, 2, 2, 3]
    assert np.isnan(source.rounds.confidences[0]).tolist() == [False, False, True, True]
    assert source.rounds.confidences[1].tolist() == [0.9] * 4
    assert source.description["sets"] == {"calibration_math": 4}
    assert source.description["temperatures"] == [0.0, 1.0]
    assert read(world, temperature=1.0).rounds.accepted.tolist() == [3, 1, 4]
    with pytest.raises(DataError, match=r"rounds\.jsonl: holds no rounds of this evaluation at temperature 0\.5"):
        read(world, temperature=0.5)


def test_evaluation_sets_are_refused_by_name(world):
    record(world, [Completion([1], [full(1)], "length")], set_name="math")
    with pytest.raises(DataError, match=r"the rounds are of math: evaluation prompts must not tune .*'calibration'"):
        read(world)


def test_evaluation_prompts_are_refused_by_content(world):
    record(world, [Completion([1], [full(1)], "length")])
    prompts = world / "prompts" / "calibration_math.jsonl"
    prompts.write_text(prompts.read_text() + '\n{"turns": ["math 2"]}')
    with pytest.raises(DataError, match=r"_math\.jsonl, line 5: also an evaluation prompt .*/math\.jsonl, line 3"):
        read(world)
    with pytest.raises(DataError, match=r"elsewhere.*no such set.*say where with prompts_dir="):
        read(world, prompts_dir=world / "elsewhere")


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ([Round(3, 1, 2, [0.5] * 3), full(2)], r"line 1: a round of 3 tokens where .* 4.*decode\.policy=fixed"),
        ([Round(4, 1, 2, None)], "line 1: rounds without confidences; this draft has no confidence head"),
        ([Round(4, 1, 2, [0.5] * 3)], "line 1: 4 tokens proposed, but 3 confidences"),
        ([], "the prompts ended before a single round"),
    ],
)
def test_rounds_that_would_mislead_are_refused(world, rounds, message):
    record(world, [Completion([1], rounds, "length")])
    with pytest.raises(DataError, match=message):
        read(world)


def test_another_draft_or_no_evaluation_is_refused(world):
    with pytest.raises(DataError, match=r"rounds=.*draft: no metrics\.json; give the output_dir of a finished"):
        read_source(world / "draft", world / "draft")
    record(world, [Completion([1], [full(1)], "length")])
    (world / "draft" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match="decoded with other weights than"):
        read(world)
    (world / "eval" / "metrics.json").write_text("{}")
    with pytest.raises(DataError, match=r"metrics\.json: not the metrics of an evaluation"):
        read(world)
    (world / "eval" / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.json: damaged"):
        read(world)


def options_of(world, *words: str) -> CalibrateOptions:
    return parse_arguments(CalibrateOptions, [f"checkpoint={world / 'draft'}", f"rounds={world / 'eval'}", *words])


def test_the_command_writes_temperatures_that_the_decoder_finds(world, capsys):
    rounds = simulated(1200, TRUE)
    completions = [
        Completion([1], [Round(4, int(a), int(a) + 1, c.tolist()) for a, c in zip(accepted, confidences, strict=True)])
        for accepted, confidences in zip(
            rounds.accepted.reshape(4, -1), rounds.confidences.reshape(4, -1, 4), strict=True
        )
    ]
    record(world, completions)
    calibrate_main(options_of(world))
    expected = fit_temperatures(rounds)
    assert load_calibration(world / "draft", 4) == expected
    written = json.loads((world / "draft" / "calibration.json").read_text())
    assert written["rounds"] == 1200
    assert written["prompts"] == 4
    assert written["source"]["sets"] == {"calibration_math": 4}
    assert {"machine", "versions", "command", "mean_ece", "bins"} <= written.keys()
    assert [position["temperature"] for position in written["positions"]] == expected
    assert (world / "draft" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "Mean ECE" in capsys.readouterr().out


def test_the_command_refuses_too_little(world):
    record(world, [Completion([1], [full(1)], "length")])
    with pytest.raises(DataError, match="1 rounds of 1 prompts are too few to calibrate"):
        calibrate_main(options_of(world))
    with pytest.raises(DataError, match="at least 2 prompts"):
        calibrate_main(options_of(world, "min_rounds=1"))
    with pytest.raises(ConfigError, match="bins=0"):
        calibrate_main(options_of(world, "bins=0"))
    assert not (world / "draft" / "calibration.json").exists()


def test_saved_temperatures_are_checked(tmp_path):
    assert load_calibration(tmp_path, 2) is None
    file = tmp_path / "calibration.json"
    file.write_text('{"temperatures": [1.5, 2]}')
    assert load_calibration(tmp_path, 2) == [1.5, 2.0]
    for content in ('{"temperatures": [1.5]}', '{"temperatures": [1.5, 0]}', '{"temperatures": [1.5, NaN]}'):
        file.write_text(content)
        with pytest.raises(DataError, match=r"calibration\.json: expected 2 temperatures above 0"):
            load_calibration(tmp_path, 2)
    for content in ("{", "[]", '{"temperatures": 1}'):
        file.write_text(content)
        with pytest.raises(DataError, match=r"calibration\.json: not a calibration"):
            load_calibration(tmp_path, 2)
