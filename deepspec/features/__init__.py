"""Where the target's features come from, behind one interface."""

from deepspec.features.cache_format import CachedRendering
from deepspec.features.cache_reader import CachedFeatures
from deepspec.features.queue import FeatureQueue, StoppedWaiting
from deepspec.features.source import FeatureSource, OnlineFeatures

__all__ = ["CachedFeatures", "CachedRendering", "FeatureQueue", "FeatureSource", "OnlineFeatures", "StoppedWaiting"]
