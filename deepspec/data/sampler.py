"""The order of the data: a pure function of the seed and the step.

Nothing has to be saved to resume, and a global batch holds the same samples on any number of ranks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
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


@dataclass(frozen=True)
class BatchSplit:
    """How the samples of an optimizer step become micro-batches of equal number on every rank."""

    global_batch_size: int  # samples
    world_size: int
    micro_batch_size: int  # samples; not used with a token budget
    tokens_per_batch: int | None = None  # the most tokens of a micro-batch
    lengths: np.ndarray | None = None  # tokens of every sample; needed for a token budget

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: the global batch cannot be split evenly.
        """
        packed = self.tokens_per_batch is not None
        per_pass = self.world_size * (1 if packed else self.micro_batch_size)
        if self.global_batch_size % per_pass:
            factor = "" if packed else f"train.micro_batch_size={self.micro_batch_size} times "
            raise ConfigError(
                f"train.global_batch_size={self.global_batch_size}: must be a multiple of {factor}the "
                f"{self.world_size} ranks ({per_pass})"
            )

    def __call__(self, keys: Sequence[SampleKey]) -> list[list[list[SampleKey]]]:
        """Micro-batches by rank of the samples of one step (or of a part of an evaluation set)."""
        groups = self._of_equal_size(keys) if self.tokens_per_batch is None else self._within_budget(keys)
        return [groups[rank :: self.world_size] for rank in range(self.world_size)]

    def _of_equal_size(self, keys: Sequence[SampleKey]) -> list[list[SampleKey]]:
        size = self.micro_batch_size
        return [list(keys[first : first + size]) for first in range(0, len(keys), size)]

    def _within_budget(self, keys: Sequence[SampleKey]) -> list[list[SampleKey]]:
        """As few groups as hold all samples within the token budget, balanced, in a multiple of the ranks.

        The longest samples go first, each to the group with the fewest tokens so far.
        """
        assert self.tokens_per_batch is not None
        assert self.lengths is not None
        lengths = self.lengths[[index for index, _ in keys]]
        order = np.argsort(-lengths, kind="stable")
        needed = math.ceil(int(lengths.sum()) / self.tokens_per_batch)
        count = self.world_size * math.ceil(needed / self.world_size)
        while True:
            heap = [(0, group) for group in range(count)]
            groups: list[list[int]] = [[] for _ in range(count)]
            for place in order.tolist():
                tokens, group = heapq.heappop(heap)
                groups[group].append(place)
                heapq.heappush(heap, (tokens + int(lengths[place]), group))
            if max(heap)[0] <= self.tokens_per_batch or count >= len(keys):
                return [[keys[place] for place in sorted(group)] for group in groups]
            count += self.world_size


class StepSampler(torch.utils.data.Sampler[list[SampleKey]]):
    """Batch sampler of one rank: its micro-batches of steps `start_step` .. `steps - 1`, in order.

    Which samples a step holds depends on the seed and the step alone; how they are split into micro-batches and over
    ranks does not change what is learned beyond rounding.
    """

    def __init__(
        self,
        split: BatchSplit,
        num_samples: int,
        *,
        rank: int,
        seed: int,
        start_step: int,
        steps: int,
    ):
        self.split = split
        self.num_samples = num_samples
        self.rank = rank
        self.seed = seed
        self.start_step = start_step
        self.steps = steps

    def micro_batches(self, step: int) -> list[list[SampleKey]]:
        """This rank's micro-batches of a step; every rank has the same number of them."""
        keys = global_batch(self.num_samples, self.split.global_batch_size, self.seed, step)
        return self.split(keys)[self.rank]

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for step in range(self.start_step, self.steps):
            yield from self.micro_batches(step)
