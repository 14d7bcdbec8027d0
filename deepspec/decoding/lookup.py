"""Prompt lookup (Saxena 2023): copy what followed the last time that the latest tokens occurred. Needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from deepspec.decoding.proposers import Proposal
from deepspec.decoding.sampling import SamplingSettings
from deepspec.decoding.span import Span


class LookupProposer:
    """Finds the longest n-gram that ends a row's tokens earlier in the same row, the latest such place, and copies on.

    The confidence is 1 where something was found and 0 elsewhere, so a threshold policy verifies nothing in vain.
    """

    layer_ids: Sequence[int] = ()
    has_confidences = True

    def __init__(self, block_size: int = 7, longest: int = 3):
        """Args: `longest` is the n of the longest n-gram that is looked for."""
        self.block_size = block_size
        self._longest = longest
        self._tokens = torch.empty(0, 0, dtype=torch.long)  # [slots, columns], where the engine's tokens are

    def bytes_per_slot(self, columns: int) -> int:
        return columns * torch.long.itemsize

    def allocate(self, slots: int, columns: int) -> None:
        self._tokens = torch.zeros(slots, columns, dtype=torch.long)

    def observe(self, span: Span, ids: Tensor, features: Tensor) -> None:
        self._tokens = self._tokens.to(ids.device)  # once: the first tokens tell where the engine works
        self._tokens[span.slot_of, span.positions] = ids

    def propose(
        self,
        anchors: Tensor,
        positions: Tensor,
        columns: int,
        settings: SamplingSettings,
        uniform: Tensor | None,
        length: int,
    ) -> Proposal:
        rows = len(anchors)
        known = torch.cat([self._tokens[:rows, :columns], anchors.new_zeros(rows, 1)], dim=1)
        known.scatter_(1, positions[:, None], anchors[:, None])  # anchor last: [rows, columns + 1]
        column = torch.arange(known.shape[1], device=known.device)
        run = self._matching_run(known, positions)
        # The longest n-gram counts first, then the latest place; the anchor's own place does not count.
        rank = torch.where(column < positions[:, None], run * known.shape[1] + column, -1)
        best = rank.argmax(1, keepdim=True)
        is_found = run.gather(1, best) > 0
        following = best + 1 + torch.arange(length, device=known.device)
        is_known = is_found & (following <= positions[:, None])
        tokens = torch.where(is_known, known.gather(1, following.clamp(max=known.shape[1] - 1)), anchors[:, None])
        return Proposal(tokens, None, is_known.float())

    def _matching_run(self, known: Tensor, positions: Tensor) -> Tensor:
        """How many tokens up to each column equal the latest ones, at most `longest`: [rows, columns]"""
        run = torch.zeros_like(known)
        still = torch.ones_like(known, dtype=torch.bool)
        for back in range(min(self._longest, known.shape[1])):
            latest = known.gather(1, (positions[:, None] - back).clamp(min=0))
            shifted = functional.pad(known[:, : known.shape[1] - back], (back, 0), value=-1)
            still = still & (shifted == latest) & (positions[:, None] >= back)
            run = run + still
        return run

    def move(self, source: int, destination: int, length: int) -> None:
        self._tokens[destination, :length] = self._tokens[source, :length]

    def clear(self, slot: int) -> None:
        self._tokens[slot].zero_()
