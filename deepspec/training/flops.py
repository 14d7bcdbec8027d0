"""Floating-point operations of a training step, and the share of a GPU's peak that they reach (PaLM, appendix B)."""

from __future__ import annotations

from typing import cast

import torch

from deepspec.drafts import DraftModel
from deepspec.drafts.backbone import Projections

# Dense bfloat16 tensor-core peak, FLOP/s, from the vendor's data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 9.89e14,
    "GH200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "RTX 4090": 1.65e14,
}


def peak_flops(device: torch.device) -> float | None:
    """bfloat16 FLOP/s of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


class StepFlops:
    """Products with weights, two operations for each multiply-add; attention scores are left out (a few percent).

    A weight counts three times (forward, gradient of its input, gradient of itself), twice where one of these is never
    needed. What is computed again (activation checkpointing) is not counted.
    """

    def __init__(self, draft: DraftModel, features_per_token: float, *, needs_target_logits: bool):
        """
        Args:
            features_per_token: FLOPs of the target's forward pass on the training device; 0 when it runs elsewhere.
            needs_target_logits: the loss compares distributions.
        """
        attentions = [cast(Projections, layer.self_attn) for layer in draft.layers]
        projections = [projection for a in attentions for projection in (a.k_proj, a.v_proj) if projection is not None]
        context_projections = sum(projection.weight.numel() for projection in projections)
        self.per_token = features_per_token + 2 * (2 * draft.fc.weight.numel() + 3 * context_projections)
        self.per_block = (
            6 * draft.draft_length * sum(weight.numel() for weight in draft.layers.parameters() if weight.ndim > 1)
        )
        proposable, hidden = draft.lm_head.weight.shape
        rank = draft.settings.markov_rank
        of_target = needs_target_logits * draft.config.vocab_size * hidden
        self.per_slot = 2 * (proposable * (2 * hidden + 3 * rank) + of_target)

    def __call__(self, tokens: int, blocks: int, slots: int) -> float:
        """Of a step over this many tokens, blocks and supervised slots."""
        return self.per_token * tokens + self.per_block * blocks + self.per_slot * slots
