"""What tells one target from another: a digest of its weights that is quick to compute."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from operator import itemgetter

import torch
from torch import Tensor

FINGERPRINT_SAMPLES = 256  # values per weight


def fingerprint_of(weights: Iterable[tuple[str, Tensor]], extra: str = "") -> str:
    """The fingerprint of named weights, in any order, see `Target.fingerprint`.

    Args:
        extra: what else tells this target from others.
    """
    digest = hashlib.sha256(extra.encode())
    for name, weight in sorted(weights, key=itemgetter(0)):
        flat = weight.detach().reshape(-1)
        count = min(flat.numel(), FINGERPRINT_SAMPLES)
        indices = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        values = flat[indices].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + values)
    return digest.hexdigest()
