"""Where blocks start in training, and what their slots are trained on (DSpark section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def anchor_candidates(loss_mask: Tensor) -> Tensor:
    """Positions whose own token and next token are both supervised: bool [batch, tokens] -> bool [batch, tokens]"""
    candidates = torch.zeros_like(loss_mask, dtype=torch.bool)
    candidates[:, :-1] = loss_mask[:, :-1].bool() & loss_mask[:, 1:].bool()
    return candidates


def sample_anchors(loss_mask: Tensor, num_anchors: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Draw anchors uniformly without replacement.

    A row's anchors depend only on its seed and its own loss mask: not on the other rows, on padding or on the rank.

    Args:
        loss_mask: [batch, tokens], nonzero = supervised. On the CPU this costs no device synchronisation.
        num_anchors: the most per row.
        seeds: one per row, 0 or above.

    Returns:
        Anchor positions [batch, blocks], sorted in each row, and the block mask, bool [batch, blocks]. A row with fewer
        candidates ends in padding blocks (position 0, mask False). `blocks` is the most that any row has, at least 1.
    """
    if len(seeds) != loss_mask.shape[0]:
        raise ValueError(f"{len(seeds)} seeds for {loss_mask.shape[0]} rows: pass one per row")
    chosen = []
    for row, seed in zip(anchor_candidates(loss_mask).cpu().numpy(), seeds, strict=True):
        positions = np.flatnonzero(row)
        if len(positions) > num_anchors:
            positions = np.random.default_rng(seed).choice(positions, num_anchors, replace=False, shuffle=False)
        chosen.append(np.sort(positions))
    blocks = max(1, max(map(len, chosen), default=0))
    anchors = torch.zeros(len(chosen), blocks, dtype=torch.long)
    mask = torch.zeros(len(chosen), blocks, dtype=torch.bool)
    for index, positions in enumerate(chosen):
        anchors[index, : len(positions)] = torch.from_numpy(positions)
        mask[index, : len(positions)] = True
    return anchors.to(loss_mask.device), mask.to(loss_mask.device)


@dataclass(frozen=True)
class SlotLabels:
    """What every slot is trained on; slot k (1-based) predicts the token at anchor + k. All [batch, blocks, slots]."""

    targets: Tensor  # token ids; meaningless where not supervised
    prev_tokens: Tensor  # the true token before: the anchor for slot 1
    source_positions: Tensor  # anchor + k - 1: the target's state that predicts the same token
    supervised: Tensor  # bool
    weights: Tensor  # w_k = exp(-(k-1)/decay), 0 where not supervised


def supervise(
    input_ids: Tensor, loss_mask: Tensor, anchor_positions: Tensor, block_mask: Tensor, block_size: int, decay: float
) -> SlotLabels:
    """Labels of every slot.

    Slot k is supervised while anchor + k is inside the sequence and every label up to slot k is on in `loss_mask`: a
    block never trains across the end of a turn.

    Args:
        input_ids: [batch, tokens]
        loss_mask: [batch, tokens], nonzero = supervised.
        anchor_positions, block_mask: [batch, blocks]
        decay: g of the slot weights, in slots.
    """
    length = input_ids.shape[1]
    slots = torch.arange(block_size, device=input_ids.device)
    sources = anchor_positions[..., None] + slots
    labels = sources + 1
    inside = (labels < length) & block_mask[..., None].bool()
    sources, labels = sources.clamp(max=length - 1), labels.clamp(max=length - 1)

    def at(values: Tensor, positions: Tensor) -> Tensor:
        return values.gather(1, positions.flatten(1)).view_as(positions)

    supervised = (inside & at(loss_mask.bool(), labels)).long().cumprod(-1).bool()
    weights = torch.exp(-slots.float() / decay) * supervised
    return SlotLabels(at(input_ids, labels), at(input_ids, sources), sources, supervised, weights)
