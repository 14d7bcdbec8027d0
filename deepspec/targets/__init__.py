"""The frozen target language model: loading, feature capture, one small adapter per model family."""

from deepspec.targets.adapters import ADAPTERS, TargetAdapter, adapter_for, register_adapter
from deepspec.targets.attention import attend_with
from deepspec.targets.generation import stop_tokens
from deepspec.targets.head import TargetHead, describe_head, load_target_head
from deepspec.targets.loading import describe_target, load_target
from deepspec.targets.positions import position_range
from deepspec.targets.source import (
    BUILTIN_WEIGHTS,
    dtype_name,
    load_target_config,
    load_tokenizer,
    resolve_dtype,
    resolve_path,
)
from deepspec.targets.target import Target, TargetFeatures

__all__ = [
    "ADAPTERS",
    "BUILTIN_WEIGHTS",
    "Target",
    "TargetAdapter",
    "TargetFeatures",
    "TargetHead",
    "adapter_for",
    "attend_with",
    "describe_head",
    "describe_target",
    "dtype_name",
    "load_target",
    "load_target_config",
    "load_target_head",
    "load_tokenizer",
    "position_range",
    "register_adapter",
    "resolve_dtype",
    "resolve_path",
    "stop_tokens",
]
