"""Micro-batches: anchors and order as pure functions; failures of a loader are not swallowed."""

from __future__ import annotations

import pytest
import torch

from deepspec.data.dataset import Sample
from deepspec.data.sampler import StepSampler
from deepspec.training.anchors import supervise
from deepspec.training.batches import EVALUATION, MicroBatchMaker, anchor_seed, evaluation_batches, training_steps


class Samples:
    """Twelve samples of 10 to 21 supervised tokens; `broken` cannot be read."""

    def __init__(self, broken: int | None = None):
        self.broken = broken

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        if index == self.broken:
            raise OSError(f"sample {index} cannot be read")
        length = 10 + index
        return Sample(index, epoch, f"row{index}", [5] * length, [0, 0] + [1] * (length - 2))


MAKE = MicroBatchMaker(pad_id=0, num_anchors=4, block_size=3, decay=4.0, seed=3)


def sampler(start_step=0, rank=0, world_size=1):
    return StepSampler(
        12,
        global_batch_size=4,
        micro_batch_size=2,
        rank=rank,
        world_size=world_size,
        seed=3,
        start_step=start_step,
        steps=6,
    )


def anchors_of(steps):
    """{(place, sample): anchors} of every micro-batch."""
    found = {}
    for number, step in enumerate(steps):
        for batch in step:
            for row, index in enumerate(batch.sample_index):
                kept = batch.inputs["block_mask"][row]
                found[number, index] = batch.inputs["anchor_positions"][row][kept].tolist()
    return found


def test_steps_are_the_same_after_a_resume_and_on_two_ranks():
    whole = anchors_of(training_steps(Samples(), sampler(), MAKE, 0))
    assert len(whole) == 24  # two passes over the data
    resumed = anchors_of(training_steps(Samples(), sampler(start_step=4), MAKE, 0))
    assert resumed == {(step - 4, index): anchors for (step, index), anchors in whole.items() if step >= 4}
    ranks = [anchors_of(training_steps(Samples(), sampler(rank=rank, world_size=2), MAKE, 0)) for rank in (0, 1)]
    assert ranks[0] | ranks[1] == whole


def test_anchors_change_with_the_epoch_the_seed_and_the_stream():
    base = anchor_seed(3, 1, 0, 5)
    assert base == anchor_seed(3, 1, 0, 5)
    assert (
        len({base, anchor_seed(4, 1, 0, 5), anchor_seed(3, 2, 0, 5), anchor_seed(3, 1, 1, 5), anchor_seed(3, 1, 0, 6)})
        == 5
    )
    whole = anchors_of(training_steps(Samples(), sampler(), MAKE, 0))
    by_sample = [[anchors for (_, index), anchors in whole.items() if index == wanted] for wanted in range(12)]
    assert any(first != second for first, second in by_sample)


def test_weight_sum_is_that_of_the_labels():
    step = next(training_steps(Samples(), sampler(), MAKE, 0))
    assert len(step) == 2
    for batch in step:
        i = batch.inputs
        labels = supervise(i["input_ids"], i["loss_mask"], i["anchor_positions"], i["block_mask"], 3, 4.0)
        assert batch.weight_sum == pytest.approx(float(labels.weights.sum()))
        assert batch.tokens == sum(10 + index for index in batch.sample_index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failing_loader_stops_training(num_workers):
    """No batch is quietly trained on again."""
    seen = []

    def read():
        for step in training_steps(Samples(broken=7), sampler(), MAKE, num_workers):
            seen.extend(index for batch in step for index in batch.sample_index)

    with pytest.raises(OSError, match="sample 7 cannot be read"):
        read()
    assert len(seen) == len(set(seen))
    assert 7 not in seen


def test_evaluation_covers_every_sample_once():
    make = MicroBatchMaker(pad_id=0, num_anchors=4, block_size=3, decay=4.0, seed=3, stream=EVALUATION)
    seen = [
        index
        for rank in range(5)
        for batch in evaluation_batches(Samples(), make, micro_batch_size=2, rank=rank, world_size=5)
        for index in batch.sample_index
    ]
    assert sorted(seen) == list(range(12))
    assert torch.is_tensor(batch_of(make).inputs["anchor_positions"])


def batch_of(make):
    return next(iter(evaluation_batches(Samples(), make, micro_batch_size=2, rank=0, world_size=1)))
