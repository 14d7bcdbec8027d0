"""The frozen target language model: loading, feature capture, one small adapter per model family."""

from deepspec.targets.adapters import ADAPTERS, TargetAdapter, adapter_for, register_adapter
from deepspec.targets.attention import attend_with
from deepspec.targets.head import TargetHead, load_target_head
from deepspec.targets.positions import position_range
from deepspec.targets.target import (
    BUILTIN_WEIGHTS,
    Target,
    TargetFeatures,
    load_target,
    load_target_config,
    load_tokenizer,
    resolve_path,
)

__all__ = [
    "ADAPTERS",
    "BUILTIN_WEIGHTS",
    "Target",
    "TargetAdapter",
    "TargetFeatures",
    "TargetHead",
    "adapter_for",
    "attend_with",
    "load_target",
    "load_target_config",
    "load_target_head",
    "load_tokenizer",
    "position_range",
    "register_adapter",
    "resolve_path",
]
