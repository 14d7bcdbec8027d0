"""What tells one target from another: a digest of its weights that is quick to compute."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

FINGERPRINT_SAMPLES = 256  # values per weight


def fingerprint_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """The fingerprint of named weights, in any order, see `Target.fingerprint`."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights):
        flat = weight.detach().reshape(-1)
        count = min(flat.numel(), FINGERPRINT_SAMPLES)
        indices = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        values = flat[indices].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values)
    return digest.hexdigest()
