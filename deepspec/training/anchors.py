"""Where blocks start in training, and what their slots are trained on (DSpark section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepspec.data.packing import TokenBatch, anchor_candidates


def sample_anchors(
    batch: TokenBatch, num_anchors: int | None, seeds: Sequence[int], *, earliest: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw anchors of every document uniformly without replacement.

    A document's anchors depend only on its seed and its own loss mask: not on what else is in the batch.

    Args:
        batch: on the CPU.
        num_anchors: the most per document; None = every place where an anchor can be.
        seeds: one per document, 0 or above.
        earliest: the first position of a document that can be an anchor.

    Returns:
        Anchor columns [rows, blocks], sorted in each row, and the block mask, bool [rows, blocks]. A row with fewer
        anchors ends in padding blocks (column 0, mask False). `blocks` is the most that any row has, at least 1.
    """
    if len(seeds) != len(batch.documents):
        raise ValueError(f"{len(seeds)} seeds for {len(batch.documents)} documents: pass one per document")
    candidates = (anchor_candidates(batch.loss_mask, batch.position_ids) & (batch.position_ids >= earliest)).numpy()
    chosen: list[list[np.ndarray]] = [[] for _ in candidates]
    for document, seed in zip(batch.documents, seeds, strict=True):
        positions = np.flatnonzero(candidates[document.row, document.columns])
        if num_anchors is not None and len(positions) > num_anchors:
            positions = np.random.default_rng(seed).choice(positions, num_anchors, replace=False, shuffle=False)
        chosen[document.row].append(document.start + np.sort(positions))
    rows = [torch.from_numpy(np.concatenate(columns)) for columns in chosen]
    blocks = max(1, *map(len, rows))
    anchors = torch.zeros(len(rows), blocks, dtype=torch.long)
    mask = torch.zeros(len(rows), blocks, dtype=torch.bool)
    for number, columns in enumerate(rows):
        anchors[number, : len(columns)] = columns
        mask[number, : len(columns)] = True
    return anchors, mask


@dataclass(frozen=True)
class SlotLabels:
    """What the N supervised slots are trained on.

    Slots are those that predict: slot k = 1..draft_length predicts the token at anchor + k.
    """

    prev_tokens: Tensor  # [rows, blocks, slots] the true token before every slot: the anchor for slot 1
    slots: Tensor  # [N] which slots are supervised: places in rows * blocks * slots, ascending
    targets: Tensor  # [N] token ids
    sources: Tensor  # [N] the target's state that predicts the same token: places in rows * tokens
    weights: Tensor  # [N] w_k = exp(-(k-1)/decay)


def supervise(
    input_ids: Tensor,
    position_ids: Tensor,
    loss_mask: Tensor,
    anchor_columns: Tensor,
    block_mask: Tensor,
    draft_length: int,
    decay: float,
) -> SlotLabels:
    """Labels of the slots that carry loss.

    Slot k is supervised while anchor + k is inside the document and every label up to slot k is on in `loss_mask`: a
    block never trains across the end of a turn.

    Args:
        input_ids, position_ids: [rows, tokens]
        loss_mask: bool [rows, tokens]
        anchor_columns, block_mask: [rows, blocks]
        draft_length: slots of a block that predict.
        decay: g of the slot weights, in slots.
    """
    length = input_ids.shape[1]
    steps = torch.arange(draft_length, device=input_ids.device)
    sources = anchor_columns[..., None] + steps  # [rows, blocks, slots]
    labels = sources + 1
    inside = (labels < length) & block_mask[..., None]
    sources, labels = sources.clamp(max=length - 1), labels.clamp(max=length - 1)

    def at(values: Tensor, columns: Tensor) -> Tensor:
        return values.gather(1, columns.flatten(1)).view_as(columns)

    same_document = at(position_ids, labels) == position_ids.gather(1, anchor_columns)[..., None] + steps + 1
    supervised = (inside & same_document & at(loss_mask, labels)).long().cumprod(-1)
    slots = supervised.flatten().nonzero().squeeze(1)
    first_columns = torch.arange(len(input_ids), device=input_ids.device)[:, None, None] * length
    return SlotLabels(
        prev_tokens=at(input_ids, sources),
        slots=slots,
        targets=at(input_ids, labels).flatten()[slots],
        sources=(sources + first_columns).flatten()[slots],
        weights=torch.exp(-(slots % draft_length).float() / decay),
    )


def loss_divisor(weights: Tensor, input_ids: Tensor, divisor: str) -> Tensor:
    """A micro-batch's share of what the loss is divided by.

    Args:
        weights: [N], of the supervised slots.
        input_ids: [rows, tokens]
        divisor: "supervised" (the sum of the weights) or "published" (rows * tokens, prompts and padding included, as
            the published Eagle3 is trained).

    Returns:
        Scalar, of the dtype of the weights; 0 where nothing is supervised.
    """
    total = weights.sum()
    return total if divisor == "supervised" else input_ids.numel() * (total > 0).to(total.dtype)
