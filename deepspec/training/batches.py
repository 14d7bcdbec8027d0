"""Micro-batches with their anchors: everything about a batch that is known before the first forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deepspec.config import TrainConfig, TrainRun
from deepspec.data.dataset import ConversationDataset
from deepspec.data.packing import Sample, TokenBatch, lay_out
from deepspec.data.sampler import BatchSplit, StepSampler
from deepspec.drafts import DraftModel, Eagle3Model
from deepspec.training.anchors import loss_divisor, sample_anchors, supervise

TRAINING, EVALUATION = 1, 2  # separate streams of anchors


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one rank gets."""

    tokens: TokenBatch
    blocks: dict[str, Tensor]  # anchors and labels, by the names of `DraftTrainingModule.forward`
    divisor: float  # its share of what the loss is divided by, see `train.loss.divisor`; 0 without supervised slots

    @property
    def num_blocks(self) -> int:
        """Without padding."""
        return int(self.blocks["block_mask"].sum())

    @property
    def num_slots(self) -> int:
        """That carry loss."""
        return len(self.blocks["slots"])

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The arguments of `DraftTrainingModule.forward` that are no features."""
        inputs = {"input_ids": self.tokens.input_ids, "position_ids": self.tokens.position_ids} | self.blocks
        return {name: value.to(device, non_blocking=True) for name, value in inputs.items()}


@dataclass(frozen=True)
class MicroBatchMaker:
    """Lays samples out and draws their anchors: a pure function of (seed, epoch, place in the dataset)."""

    pad_id: int
    packed: bool  # all samples in one row, or each padded in its own
    num_anchors: int | None  # None = every place where an anchor can be
    draft_length: int
    decay: float
    seed: int
    stream: int = TRAINING
    earliest_anchor: int = 0  # position of a document
    divisor: str = "supervised"

    def __call__(self, samples: Sequence[Sample]) -> MicroBatch:
        batch = lay_out([samples] if self.packed else [[sample] for sample in samples], self.pad_id)
        seeds = [anchor_seed(self.seed, self.stream, sample.epoch, sample.index) for sample in samples]
        anchors, block_mask = sample_anchors(batch, self.num_anchors, seeds, earliest=self.earliest_anchor)
        labels = supervise(
            batch.input_ids, batch.position_ids, batch.loss_mask, anchors, block_mask, self.draft_length, self.decay
        )
        return MicroBatch(
            tokens=batch,
            blocks={"anchor_columns": anchors, "block_mask": block_mask, **vars(labels)},
            divisor=float(loss_divisor(labels.weights.double(), batch.input_ids, self.divisor)),
        )


def batch_maker(run: TrainRun, draft: DraftModel, pad_id: int, stream: int) -> MicroBatchMaker:
    """For this draft: DSpark and DFlash draw anchors; Eagle3 starts a chain wherever one can start, and weighs its
    steps by train.loss.step_decay."""
    loss, is_chain = run.train.loss, isinstance(draft, Eagle3Model)
    return MicroBatchMaker(
        pad_id=pad_id,
        packed=run.train.tokens_per_batch is not None,
        num_anchors=None if is_chain else run.train.num_anchors,
        draft_length=draft.draft_length,
        decay=-1 / min(math.log(loss.step_decay), -1e-9) if is_chain else loss.decay,
        seed=run.seed,
        stream=stream,
        earliest_anchor=1 if is_chain else 0,
        divisor=loss.divisor,
    )


def batch_split(train: TrainConfig, world_size: int, lengths: np.ndarray | None = None) -> BatchSplit:
    """How `train` wants a step split. Raises ConfigError when the global batch does not divide evenly."""
    return BatchSplit(train.global_batch_size, world_size, train.micro_batch_size or 1, train.tokens_per_batch, lengths)


def anchor_seed(seed: int, stream: int, epoch: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, stream, epoch, index)).generate_state(1, np.uint64)[0])


def training_steps(
    dataset: ConversationDataset, sampler: StepSampler, make: MicroBatchMaker, num_workers: int
) -> Iterator[list[MicroBatch]]:
    """For each step, this rank's micro-batches. What fails in a worker process is raised here."""
    micro_batches = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=make, num_workers=num_workers))
    for step in range(sampler.start_step, sampler.steps):
        yield list(islice(micro_batches, len(sampler.micro_batches(step))))


def evaluation_batches(
    dataset: ConversationDataset, make: MicroBatchMaker, split: BatchSplit, rank: int
) -> Iterator[tuple[MicroBatch, bool]]:
    """This rank's share of one pass over the dataset, and whether it counts.

    Every rank gets the same number, because with partitioned weights all ranks run the forward pass together: a rank
    with less to do repeats a batch that does not count.
    """
    shares = split([(index, 0) for index in range(len(dataset))])
    mine = [keys for keys in shares[rank] if keys]
    repeated = [shares[0][0]] * (max(map(len, shares)) - len(mine))
    loader = DataLoader(dataset, batch_sampler=mine + repeated, collate_fn=make)
    yield from ((batch, number < len(mine)) for number, batch in enumerate(loader))
