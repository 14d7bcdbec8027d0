"""Micro-batches with their anchors: everything about a batch that is known before the first forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deepspec.data.dataset import ConversationDataset, Sample, collate
from deepspec.data.sampler import StepSampler
from deepspec.training.anchors import sample_anchors, supervise

TRAINING, EVALUATION = 1, 2  # separate streams of anchors


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank gets."""

    inputs: dict[str, Tensor]  # input_ids, attention_mask, loss_mask [batch, tokens]; anchor_positions, block_mask
    sample_index: list[int]  # places in the dataset
    weight_sum: float  # of the supervised slots
    tokens: int  # without padding

    def to(self, device: torch.device) -> dict[str, Tensor]:
        return {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}


@dataclass(frozen=True)
class MicroBatchMaker:
    """Pads samples and draws their anchors: a pure function of (seed, epoch, place in the dataset)."""

    pad_id: int
    num_anchors: int
    block_size: int
    decay: float
    seed: int
    stream: int = TRAINING

    def __call__(self, samples: Sequence[Sample]) -> MicroBatch:
        inputs = collate(samples, self.pad_id)
        seeds = [anchor_seed(self.seed, self.stream, sample.epoch, sample.index) for sample in samples]
        anchors, block_mask = sample_anchors(inputs["loss_mask"], self.num_anchors, seeds)
        labels = supervise(inputs["input_ids"], inputs["loss_mask"], anchors, block_mask, self.block_size, self.decay)
        return MicroBatch(
            inputs={name: inputs[name] for name in ("input_ids", "attention_mask", "loss_mask")}
            | {"anchor_positions": anchors, "block_mask": block_mask},
            sample_index=[sample.index for sample in samples],
            weight_sum=float(labels.weights.double().sum()),
            tokens=int(inputs["attention_mask"].sum()),
        )


def anchor_seed(seed: int, stream: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, stream, epoch, index)).generate_state(1, np.uint64)[0])


def training_steps(
    dataset: ConversationDataset, sampler: StepSampler, make: MicroBatchMaker, num_workers: int
) -> Iterator[list[MicroBatch]]:
    """For each step, this rank's micro-batches. What fails in a worker process is raised here."""
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=make, num_workers=num_workers)
    micro_batches = iter(loader)
    while step := list(islice(micro_batches, sampler.accumulation)):
        yield step


def evaluation_batches(
    dataset: ConversationDataset, make: MicroBatchMaker, *, micro_batch_size: int, rank: int, world_size: int
) -> Iterable[MicroBatch]:
    """This rank's share of one pass over the dataset."""
    keys = [(index, 0) for index in range(rank, len(dataset), world_size)]
    batches = [keys[first : first + micro_batch_size] for first in range(0, len(keys), micro_batch_size)]
    return DataLoader(dataset, batch_sampler=batches, collate_fn=make)
