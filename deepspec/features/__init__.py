"""Where the target's features come from, behind one interface."""

from deepspec.features.source import FeatureSource, OnlineFeatures, build_feature_source

__all__ = ["FeatureSource", "OnlineFeatures", "build_feature_source"]
