"""SPS tables: what lies between and beyond the measured sizes, files, smoothing, measuring, the shipped roofline."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from decoding_world import random_draft, random_target
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deepspec.arguments import parse_arguments
from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.decoding.policies import PolicySetup, build_policy
from deepspec.decoding.profile import ProfileOptions, curves, layout, print_curves
from deepspec.decoding.profile import main as profile_main
from deepspec.decoding.roofline import H200, QWEN3_4B, Roofline, roofline_record
from deepspec.decoding.sps import SHIPPED, SpsTable, load_table, smooth, smoothing_report
from deepspec.environment import machine


def test_time_is_linear_between_sizes_and_goes_on_with_the_last_slope():
    table = SpsTable([2, 4, 8], [1 / 2.0, 1 / 3.0, 1 / 7.0])
    assert table.pass_seconds([1, 2, 3, 4, 6, 8, 10]) == pytest.approx([2.0, 2.0, 2.5, 3.0, 5.0, 7.0, 9.0])
    assert SpsTable([4], [0.5]).pass_seconds([1, 4, 8]) == pytest.approx([2.0, 2.0, 4.0])
    falling = SpsTable([1, 2], [1.0, 2.0])
    assert falling.pass_seconds([3]) == pytest.approx([0.5])


def test_rows_add_what_a_round_costs_besides_its_pass():
    table = SpsTable([1, 9], [1.0, 1 / 9.0], rows=[1, 3], draft_seconds=[0.5, 0.7], context_seconds=[0.1, 0.3])
    assert table.round_seconds([2, 5], [1, 2]) == pytest.approx([2.6, 5.8])
    assert table.round_seconds([2, 5], [1, 2], drafting=False) == pytest.approx([2.1, 5.2])
    assert SpsTable([1], [1.0]).beside_seconds([1, 2]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "at least one point"),
        (([1, 2], [1.0]), "2 tokens, but 1 steps_per_second"),
        (([2, 1], [1.0, 1.0]), "tokens must be rising"),
        (([0, 1], [1.0, 1.0]), "tokens must be rising"),
        (([1], [0.0]), "above 0"),
        (([1], [float("nan")]), "finite"),
        (([1], [1.0], [2, 2], [0.1, 0.1]), "rows must be rising"),
        (([1], [1.0], [1], [-0.1]), "not negative"),
        (([1], [1.0], [1, 2], [0.1]), "2 rows, but 1 draft_seconds"),
        (([1], [1.0], [1, 2], [0.1, 0.1], [0.1]), "2 rows, but 1 context_seconds"),
    ],
)
def test_impossible_tables_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpsTable(*arguments)


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=12))
def test_smoothing_never_falls_and_leaves_rising_times_alone(seconds):
    smoothed = smooth(seconds)
    assert (np.diff(smoothed) >= -1e-15).all()
    rising = np.sort(seconds)
    assert smooth(rising) == pytest.approx(rising)
    assert min(seconds) * (1 - 1e-9) <= smoothed.min()
    assert smoothed.max() <= max(seconds) * (1 + 1e-9)


def test_smoothing_says_what_it_changed():
    smoothed = smooth([1.0, 1.2, 1.1, 2.0])
    pooled = (1 / 1.2 + 1 / 1.1) / (1 / 1.2**2 + 1 / 1.1**2)
    assert smoothed == pytest.approx([1.0, pooled, pooled, 2.0])
    report = smoothing_report([1.0, 1.2, 1.1, 2.0], smoothed)
    assert report["changed_points"] == 2
    assert report["largest_change"] == pytest.approx(1 - pooled / 1.2)
    assert report["mean_change"] == pytest.approx((1 - pooled / 1.2 + pooled / 1.1 - 1) / 4)


def write(folder, content) -> str:
    file = folder / "table.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


POINTS = [{"tokens": 1, "steps_per_second": 10.0}, {"tokens": 8, "steps_per_second": 5.0}]


def test_a_table_of_another_machine_is_used_with_a_warning(tmp_path, caplog):
    here = write(tmp_path, {"points": POINTS, "machine": machine()})
    with caplog.at_level(logging.WARNING):
        assert load_table(here).steps_per_second == [10.0, 5.0]
        assert not caplog.records
        elsewhere = write(tmp_path, {"points": POINTS, "machine": machine() | {"accelerator": "NVIDIA X"}})
        assert load_table(elsewhere).tokens == [1, 8]
        assert "is not an SPS table of this machine (accelerator NVIDIA X, here" in caplog.text
        caplog.clear()
        load_table(elsewhere, of_this_machine=False)
        assert not caplog.records
        load_table(write(tmp_path, {"points": POINTS}))
        assert "cpu None, here" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"points": []},
        {"points": [{"tokens": 1}]},
        {"points": [{"tokens": "1", "steps_per_second": 3.0}]},
        {"points": POINTS, "rows": [{"rows": 1}]},
    ],
)
def test_what_is_not_a_table_is_refused(tmp_path, content):
    with pytest.raises(DataError, match=r"table\.json: not an SPS table .*expected"):
        load_table(write(tmp_path, content))


def test_a_table_that_is_not_there_is_answered_with_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match=r"h100_qwen3_4b: no such SPS table.*Did you mean 'h200_qwen3_4b'"):
        load_table("h100_qwen3_4b")


def test_the_shipped_table_is_what_its_derivation_gives():
    record = json.loads((SHIPPED / "h200_qwen3_4b.json").read_text())
    assert record == roofline_record()
    table = load_table("h200_qwen3_4b", of_this_machine=False)
    # Worked out by hand: 8.0445 GB of weights at 80% of 4.8 TB/s and 0.3 ms; 512 tokens at 60% of 989 TFLOP/s.
    assert table.pass_seconds([1])[0] == pytest.approx(8.044544e9 / 3.84e12 + 0.3e-3)
    multiply_adds = 8.044544e9 / 2 + 2 * 36 * 32 * 128 * 1024
    assert table.pass_seconds([512])[0] == pytest.approx(2 * 512 * multiply_adds / 593.4e12 + 0.3e-3)
    assert record["derivation"]["memory_bound_tokens"] == int(8.044544e9 / 3.84e12 / (2 * multiply_adds / 593.4e12))


def test_the_roofline_counts_qwen3_4b_right():
    assert QWEN3_4B.weights == pytest.approx(4.02e9, rel=0.002)
    near, far = (Roofline(H200, QWEN3_4B, context) for context in (1024, 4096))
    further = (far.context_seconds(8) - near.context_seconds(8)) * 3.84e12 / (8 * 3072)
    assert further == pytest.approx(2 * 36 * 8 * 128 * 2)  # bytes of keys and values per token
    weights = QWEN3_4B.draft_weights + 7 * 256 * 151936
    reading = 2 * weights + 1024 * 2 * 5 * 8 * 128 * 2
    assert near.draft_seconds(1) == pytest.approx(reading / 3.84e12 + 60e-6 + 7 * 15e-6)


def test_more_load_leaves_fewer_places_on_the_shipped_gpu():
    table = load_table("h200_qwen3_4b", of_this_machine=False)
    policy = build_policy("prefix", PolicySetup(7, 256, has_confidences=True, sps=table))
    confidences = torch.full((256, 7), 0.6)
    lengths = [policy.lengths(confidences[:rows], rows).double().mean().item() for rows in (8, 32, 256)]
    assert lengths[0] == 7
    assert 7 > lengths[1] > lengths[2]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, (1, 1)), (8, (1, 8)), (12, (2, 6)), (13, (13, 1)), (64, (8, 8)), (20, (4, 5))]
)
def test_a_pass_has_as_few_rows_as_divide_it(tokens, expected):
    assert layout(tokens, 8) == expected


def test_curves_hold_samples_medians_and_smoothed_values():
    record = curves({1: [1.0, 3.0, 2.0], 4: [1.0, 1.0, 1.0]}, {2: [0.5]}, {1: 1, 4: 2})
    first, second = record["points"]
    assert first["median_seconds"] == 2.0
    assert first["quartiles"] == [1.5, 2.5]
    assert first["samples"] == [1.0, 3.0, 2.0]
    assert first["steps_per_second"] == second["steps_per_second"] == pytest.approx((1 / 2**2 + 1) / (1 / 2 + 1))
    assert second["rows"] == 2
    assert record["rows"] == [
        {"rows": 2, "draft_seconds": 0.5, "median_seconds": 0.5, "quartiles": [0.5, 0.5], "samples": [0.5]}
    ]
    assert record["smoothing"]["points"]["changed_points"] == 2
    print_curves(record, Console(quiet=True))


@pytest.fixture
def checkpoint(tmp_path):
    """A draft with its target, both saved."""
    target = random_target()
    target.model.save_pretrained(tmp_path / "target")
    random_draft(target).save_pretrained(tmp_path / "draft")
    return tmp_path


def test_profile_measures_this_machine_and_writes_beside_the_checkpoint(checkpoint, caplog, capsys):
    words = ["tokens=[1,4,12]", "rows=[1,3]", "repeats=2", "context=6", f"target={checkpoint / 'target'}"]
    with caplog.at_level(logging.WARNING, logger="deepspec"):
        profile_main(parse_arguments(ProfileOptions, [f"checkpoint={checkpoint / 'draft'}", *words]))
        table = load_table(checkpoint / "draft" / "sps.json")
    assert not caplog.records
    assert table.tokens == [1, 4, 12]
    assert table.rows == [1, 3]
    record = json.loads((checkpoint / "draft" / "sps.json").read_text())
    assert [point["rows"] for point in record["points"]] == [1, 1, 2]
    assert [len(point["samples"]) for point in record["points"] + record["rows"]] == [2] * 5
    assert record["settings"]["tokens_per_row"] == 6
    assert {"machine", "versions", "command", "smoothing", "target"} <= record.keys()
    assert "Drafting, by rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=[0]"], r"tokens=\[0\]: give sizes of at least 1"),
        (["rows=[]"], r"rows=\[\]: give sizes"),
        (["repeats=0"], "repeats=0: must be at least 1"),
        (["dtype=float31"], "dtype=float31: must be one of .*Did you mean 'float32'"),
        (["context=254"], "context=254: .* positions"),
        ([], "does not say what target it was trained for; give target="),
    ],
)
def test_profile_refuses_what_it_cannot_measure(checkpoint, words, message):
    target = [f"target={checkpoint / 'target'}"] if words else []
    with pytest.raises(ConfigError, match=message):
        profile_main(parse_arguments(ProfileOptions, [f"checkpoint={checkpoint / 'draft'}", *target, *words]))
