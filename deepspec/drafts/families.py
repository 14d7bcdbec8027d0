"""What a draft layer takes from its target's family: the family's own modules from Transformers, nothing copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from deepspec.config import ConfigError, near_match


@dataclass(frozen=True)
class Family:
    """Building blocks of one target family."""

    config_class: type[PreTrainedConfig]
    norm: Callable[..., nn.Module]  # norm(size, eps=...)
    mlp: Callable[..., nn.Module]  # mlp(config)
    rotary: Callable[..., nn.Module]  # rotary(config)(states, positions) -> cos, sin
    apply_rotary: Callable[..., tuple[Tensor, Tensor]]  # (query, key, cos, sin) -> both rotated
    query_key_norm: bool  # RMSNorm over each query and key head


FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        config_class=Qwen3Config,
        norm=modeling_qwen3.Qwen3RMSNorm,
        mlp=modeling_qwen3.Qwen3MLP,
        rotary=modeling_qwen3.Qwen3RotaryEmbedding,
        apply_rotary=modeling_qwen3.apply_rotary_pos_emb,
        query_key_norm=True,
    ),
    "llama": Family(
        config_class=LlamaConfig,
        norm=modeling_llama.LlamaRMSNorm,
        mlp=modeling_llama.LlamaMLP,
        rotary=modeling_llama.LlamaRotaryEmbedding,
        apply_rotary=modeling_llama.apply_rotary_pos_emb,
        query_key_norm=False,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a target's or a draft's config.

    Raises:
        ConfigError: no draft can be built for this `model_type`.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model_type={config.model_type}: no draft layers for this family; supported are "
            f"{', '.join(FAMILIES)}.{near_match(config.model_type, FAMILIES)}"
        )
    return FAMILIES[config.model_type]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
