"""Feature sources: for a batch of token ids, the target features that the draft trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deepspec.data.packing import TokenBatch
from deepspec.targets import Target, TargetFeatures


class FeatureSource(Protocol):
    """Anything that gives target features for a batch."""

    concurrency: int  # batches that it may be asked for at once, from as many threads

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

    def __init__(self, target: Target, layer_ids: Sequence[int]):
        self.target = target
        self.layer_ids = list(layer_ids)

    def batch_features(self, batch: TokenBatch) -> TargetFeatures:
        return self.target.features(batch.to(self.target.device), self.layer_ids)

    def close(self) -> None:
        pass


def build_feature_source(name: str, target: Target, layer_ids: Sequence[int]) -> FeatureSource:
    """The source that `features.source` names (its values are checked by `deepspec.config.validate`)."""
    sources = {"online": OnlineFeatures}
    return sources[name](target, layer_ids)
