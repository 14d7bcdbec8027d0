"""Names and meaning of the training metrics (DSpark section 4). All are sums until the very end, so they add up over
micro-batches and ranks whatever the split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


@torch.no_grad()
def acceptance_sums(accept: Tensor, slots: Tensor, block_mask: Tensor, draft_length: int) -> dict[str, Tensor]:
    """Sums behind accept_rate@k and tau.

    Args:
        accept: [N], 1 - TV of every supervised slot.
        slots: [N], their places in rows * blocks * draft_length.
        block_mask: bool [rows, blocks]

    Returns:
        `slots` [draft_length] how many are supervised, `accept` [draft_length], `blocks` scalar, and
        `expected_accepted` scalar: sum over blocks of sum_k prod_{i<=k} accept_i, where an unsupervised slot accepts
        nothing.
    """
    per_slot = torch.zeros(block_mask.numel() * draft_length, device=accept.device)
    supervised = per_slot.clone()
    per_slot[slots], supervised[slots] = accept.float(), 1.0
    per_slot = per_slot.view(-1, draft_length)
    return {
        "slots": supervised.view(-1, draft_length).sum(0),
        "accept": per_slot.sum(0),
        "blocks": block_mask.sum().float(),
        "expected_accepted": per_slot.cumprod(-1).sum(),
    }


def add_sums(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Add the sums of several micro-batches, key by key, detached."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value.detach() if name in total else value.detach()
    return total


def summarize(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Turn summed sums into metrics.

    Args:
        sums: as `DraftTrainingModule` returns them, added over micro-batches and ranks.

    Returns:
        `loss`, divided by the `divisor`; `ce`, `tv` (mean L1 distance, 0 to 2) and `confidence_loss`, each divided by
        the weight sum;
        `accept_rate@k` for k = 1..draft_length, the mean of 1 - TV at slot k; `tau`, the expected tokens per round
        1 + sum_k prod_{i<=k} accept_i averaged over blocks; `confidence_abs_error` and `confidence_bias`, the weighted
        means of |c_k - accept_k| and c_k - accept_k. A metric that was not computed or averages nothing is left out.
    """
    sums = {name: value.detach() for name, value in sums.items()}
    weight = float(sums["weight_sum"])
    metrics: dict[str, float] = {}
    if weight > 0:
        if "loss" in sums:
            metrics["loss"] = float(sums["loss"]) / float(sums["divisor"])
        for name in ("ce", "tv", "confidence_loss", "confidence_abs_error", "confidence_bias"):
            if name in sums:
                metrics[name] = float(sums[name]) / weight
    if "slots" in sums:
        for k, (count, accept) in enumerate(zip(sums["slots"].tolist(), sums["accept"].tolist(), strict=True), start=1):
            if count > 0:
                metrics[f"accept_rate@{k}"] = accept / count
        if float(sums["blocks"]) > 0:
            metrics["tau"] = 1 + float(sums["expected_accepted"]) / float(sums["blocks"])
    return metrics
