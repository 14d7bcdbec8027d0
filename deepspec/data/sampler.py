"""The order of the data: a pure function of the seed and the step.

Nothing has to be saved to resume, and a global batch holds the same samples on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from deepspec.config import ConfigError

SampleKey = tuple[int, int]  # (index in the dataset, epoch)


def global_batch(num_samples: int, batch_size: int, seed: int, step: int) -> list[SampleKey]:
    """The samples of optimizer step `step` (from 0): a slice of the endless row of per-epoch permutations."""
    first = step * batch_size
    keys: list[SampleKey] = []
    while len(keys) < batch_size:
        epoch, offset = divmod(first + len(keys), num_samples)
        order = _permutation(num_samples, seed, epoch)
        keys += [(int(i), epoch) for i in order[offset : offset + batch_size - len(keys)]]
    return keys


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes of one rank in an optimizer step.

    Raises:
        ConfigError: the global batch cannot be split evenly.
    """
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size={global_batch_size}: must be a multiple of train.micro_batch_size="
            f"{micro_batch_size} times the {world_size} ranks ({per_pass})"
        )
    return global_batch_size // per_pass


class StepSampler(torch.utils.data.Sampler[list[SampleKey]]):
    """Batch sampler of one rank: its micro-batches of steps `start_step` .. `steps - 1`, in order.

    A global batch is laid out as [accumulation, rank, micro-batch], so the samples of a step do not depend on how many
    ranks share it.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start_step: int,
        steps: int,
    ):
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start_step = start_step
        self.steps = steps
        self.accumulation = micro_batches_per_step(global_batch_size, micro_batch_size, world_size)

    def __len__(self) -> int:
        return (self.steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[SampleKey]]:
        size = self.micro_batch_size
        for step in range(self.start_step, self.steps):
            keys = global_batch(self.num_samples, self.global_batch_size, self.seed, step)
            for part in range(self.accumulation):
                first = (part * self.world_size + self.rank) * size
                yield keys[first : first + size]
