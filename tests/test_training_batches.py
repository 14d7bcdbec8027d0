"""Micro-batches: anchors and order as pure functions; failures of a loader are not swallowed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deepspec.data.packing import Sample
from deepspec.data.sampler import BatchSplit, StepSampler
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


LENGTHS = np.arange(10, 22)
MAKE = MicroBatchMaker(pad_id=0, packed=False, num_anchors=4, draft_length=3, decay=4.0, seed=3)
PACK = replace(MAKE, packed=True)


def sampler(start_step=0, rank=0, world_size=1, budget=None):
    split = BatchSplit(4, world_size, 2, budget, LENGTHS)
    return StepSampler(split, 12, rank=rank, seed=3, start_step=start_step, steps=6)


def anchors_of(steps):
    """{(place, sample): anchors, counted from the start of the document} of every micro-batch."""
    found = {}
    for number, step in enumerate(steps):
        for batch in step:
            for document in batch.tokens.documents:
                columns = batch.blocks["anchor_columns"][document.row][batch.blocks["block_mask"][document.row]]
                inside = (columns >= document.start) & (columns < document.start + document.length)
                found[number, document.index] = (columns[inside] - document.start).tolist()
    return found


def indices(batch):
    return [document.index for document in batch.tokens.documents]


def test_steps_are_the_same_after_a_resume_and_on_two_ranks():
    whole = anchors_of(training_steps(Samples(), sampler(), MAKE, 0))
    assert len(whole) == 24  # two passes over the data
    resumed = anchors_of(training_steps(Samples(), sampler(start_step=4), MAKE, 0))
    assert resumed == {(step - 4, index): anchors for (step, index), anchors in whole.items() if step >= 4}
    ranks = [anchors_of(training_steps(Samples(), sampler(rank=rank, world_size=2), MAKE, 0)) for rank in (0, 1)]
    assert ranks[0] | ranks[1] == whole


def test_packed_steps_hold_the_same_samples_and_anchors():
    whole = anchors_of(training_steps(Samples(), sampler(), MAKE, 0))
    for world_size in (1, 2):
        ranks = [
            list(training_steps(Samples(), sampler(rank=rank, world_size=world_size, budget=40), PACK, 0))
            for rank in range(world_size)
        ]
        assert {key: value for steps in ranks for key, value in anchors_of(steps).items()} == whole
        assert len({tuple(map(len, steps)) for steps in ranks}) == 1
        for batch in (batch for steps in ranks for step in steps for batch in step):
            assert batch.tokens.input_ids.shape == (1, batch.tokens.tokens)
            assert batch.tokens.tokens <= 40


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
        assert batch.divisor == pytest.approx(float(batch.blocks["weights"].sum()))
        assert batch.num_blocks == 8
        assert batch.tokens.tokens == sum(10 + index for index in indices(batch))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failing_loader_stops_training(num_workers):
    """No batch is quietly trained on again."""
    seen = []

    def read():
        for step in training_steps(Samples(broken=7), sampler(), MAKE, num_workers):
            seen.extend(index for batch in step for index in indices(batch))

    with pytest.raises(OSError, match="sample 7 cannot be read"):
        read()
    assert len(seen) == len(set(seen))
    assert 7 not in seen


@pytest.mark.parametrize(("make", "budget"), [(MAKE, None), (PACK, 64)])
def test_evaluation_covers_every_sample_once_in_equally_many_batches(make, budget):
    make = replace(make, stream=EVALUATION)
    split = BatchSplit(5, 5, 1, budget, LENGTHS)
    shares = [list(evaluation_batches(Samples(), make, split, rank)) for rank in range(5)]
    assert len({len(share) for share in shares}) == 1
    seen = [index for share in shares for batch, counts in share if counts for index in indices(batch)]
    assert sorted(seen) == list(range(12))


def test_evaluation_on_more_ranks_than_samples():
    split = BatchSplit(16, 16, 1, None, LENGTHS)
    shares = [list(evaluation_batches(Samples(), MAKE, split, rank)) for rank in range(16)]
    assert [sum(counts for _, counts in share) for share in shares] == [1] * 12 + [0] * 4
    assert [len(share) for share in shares] == [1] * 16
