"""Number of steps and learning rate."""

from __future__ import annotations

import json
import math

import pytest

from deepspec.config import TrainConfig
from deepspec.training.schedule import learning_rate, total_steps


def test_reference_schedule_without_its_overshoot(goldens):
    record = json.loads((goldens / "dspark_vanilla.json").read_text())
    reference = record["lr_schedule_lr6e-4_total100_warmup0.04"]
    ours = [learning_rate(step, peak=6e-4, warmup_ratio=0.04, steps=100) for step in range(100)]
    assert ours[:4] == pytest.approx(reference[:4], rel=1e-12)
    overshoot = reference[4] / 6e-4
    assert 1 < overshoot < 1.001
    assert [rate * overshoot for rate in ours[4:]] == pytest.approx(reference[4:], rel=1e-9)
    assert max(ours) == 6e-4


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.04, 0.5, 1.0])
def test_never_above_the_peak_and_always_above_zero(steps, warmup_ratio):
    rates = [learning_rate(step, peak=1.0, warmup_ratio=warmup_ratio, steps=steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    warmup = round(warmup_ratio * steps)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert math.isclose(max(rates), 1.0)


@pytest.mark.parametrize(
    ("train", "samples", "expected"),
    [
        (TrainConfig(steps=5, epochs=99.0), 1000, 5),
        (TrainConfig(epochs=10.0, global_batch_size=512), 1024, 20),
        (TrainConfig(epochs=1.0, global_batch_size=512), 1025, 3),
        (TrainConfig(epochs=0.1, global_batch_size=10), 300, 3),
        (TrainConfig(epochs=0.001, global_batch_size=512), 10, 1),
    ],
)
def test_total_steps(train, samples, expected):
    assert total_steps(train, samples) == expected
