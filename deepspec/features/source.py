"""Feature sources: for a batch of token ids, the target features that the draft trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from deepspec.targets import Target, TargetFeatures


class FeatureSource(Protocol):
    """Anything that gives target features for a batch."""

    def batch_features(self, input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """[batch, tokens] ids and mask (1 = real, 0 = right padding) -> features on the ids' device."""
        ...


class OnlineFeatures:
    """The target is resident and computes the features of each batch as it comes. Nothing is stored."""

    def __init__(self, target: Target, layer_ids: Sequence[int]):
        self.target = target
        self.layer_ids = list(layer_ids)

    def batch_features(self, input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        return self.target.features(input_ids, attention_mask, self.layer_ids)


def build_feature_source(name: str, target: Target, layer_ids: Sequence[int]) -> FeatureSource:
    """The source that `features.source` names (its values are checked by `deepspec.config.validate`)."""
    sources = {"online": OnlineFeatures}
    return sources[name](target, layer_ids)
