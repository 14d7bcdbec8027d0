"""A training step as papers write it down, to compare ours with.

Padded batches, one dense [query, key] mask, logits of every slot for draft and target through autograd, and the target
run with the padding mask of Transformers. Same draft, same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from deepspec.data.packing import TokenBatch
from deepspec.kernels.attention import block_attention_masked
from deepspec.kernels.losses import vocabulary_losses_reference
from deepspec.targets import Target, TargetFeatures
from deepspec.training.batches import MicroBatch


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Within the block, drafts attend with a dense mask and the objective computes with every logit."""
    with (
        patch("deepspec.drafts.backbone.block_attention", block_attention_masked),
        patch("deepspec.training.objective.vocabulary_losses", vocabulary_losses_reference),
    ):
        yield


def with_every_slot(batch: MicroBatch, block_size: int) -> MicroBatch:
    """The same labels for all slots of all blocks, with weight 0 where a slot carries no loss."""
    blocks = dict(batch.blocks)
    rows, count = blocks["block_mask"].shape
    slots = torch.arange(rows * count * block_size)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(slots)).index_copy_(0, batch.blocks["slots"], values)

    blocks |= {name: spread(batch.blocks[name]) for name in ("targets", "sources", "weights")}
    return MicroBatch(batch.tokens, blocks | {"slots": slots}, batch.divisor)


class PaddedFeatures:
    """The target's features of padded batches, masked as Transformers masks them."""

    flops_per_token = 0.0

    def __init__(self, target: Target, layer_ids: Sequence[int]):
        self.target = target
        self.layer_ids = list(layer_ids)

    @torch.no_grad()
    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        mask = torch.zeros_like(batch.input_ids)
        for document in batch.documents:
            mask[document.row, document.columns] = 1
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": mask}
        device = self.target.device
        return self.target.hidden_states(self.layer_ids, **{name: value.to(device) for name, value in inputs.items()})
