"""Where the target's features come from, behind one interface."""

from deepspec.features.queue import FeatureQueue
from deepspec.features.source import FeatureSource, OnlineFeatures, build_feature_source

__all__ = ["FeatureQueue", "FeatureSource", "OnlineFeatures", "build_feature_source"]
