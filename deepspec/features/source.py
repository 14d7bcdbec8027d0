"""Feature sources: for a batch of token ids, the target features that the draft trains on."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Protocol

import torch

from deepspec.data.packing import TokenBatch
from deepspec.targets import Target, TargetFeatures


class FeatureSource(Protocol):
    """Anything that gives target features for a batch."""

    concurrency: int  # batches that it may be asked for at once, from as many threads
    flops_per_token: float  # of the target's forward pass on the training device; 0 when it runs elsewhere
    is_remote: bool  # other processes compute, which may be slow or gone for long

    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        """Features [rows, tokens, ...] of every document as if it stood alone, on the device that trains.

        What stands at padding means nothing, but is finite, and so is `final` where no slot can be supervised by it
        (`deepspec.data.packing.anchor_candidates`).

        Args:
            batch: on the CPU.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds. No batch is asked for afterwards; one that is waited for may fail."""
        ...


class OnlineFeatures:
    """The target is resident and computes the features of each batch as it comes. Nothing is stored."""

    concurrency = 1
    is_remote = False

    def __init__(self, target: Target, layer_ids: Sequence[int], device: torch.device | None = None):
        """
        Args:
            device: where the features are wanted; None = where the target is.
        """
        self.target = target
        self.layer_ids = list(layer_ids)
        self.device = target.device if device is None else device
        self._lock = Lock()  # the target is not reentrant; a background thread may ask too
        self.flops_per_token = 2.0 * sum(weight.numel() for weight in target.decoder_layers.parameters())

    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        with self._lock:
            features = self.target.features(batch.to(self.target.device), self.layer_ids)
        return TargetFeatures(*(tensor.to(self.device, non_blocking=True) for tensor in vars(features).values()))

    def close(self) -> None:
        pass
