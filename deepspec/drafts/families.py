"""What a draft layer is made of: a family's own modules from Transformers, nothing copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import Gemma4TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from deepspec.config import ConfigError


@dataclass(frozen=True)
class Family:
    """Building blocks of the drafts of one `model_type`."""

    config_class: type[PreTrainedConfig]
    norm: Callable[..., nn.Module]  # norm(size, eps=...)
    mlp: Callable[..., nn.Module]  # mlp(config)
    rotary: Callable[..., nn.Module]  # rotary(config)(states, positions) -> cos, sin
    apply_rotary: Callable[..., tuple[Tensor, Tensor]]  # (query, key, cos, sin) -> both rotated
    query_key_norm: bool = True  # a norm over each query and key head
    value_norm: Callable[..., nn.Module] | None = None  # the same over each value head
    attention_scale: float | None = None  # None = 1 / sqrt(head_dim)
    scales_embedding: bool = False  # by sqrt(hidden_size), without a field in the config


def _gemma4_mlp(config: Gemma4TextConfig) -> nn.Module:
    return modeling_gemma4.Gemma4TextMLP(config, layer_idx=0)


def _gemma4_rotary(config: PreTrainedConfig) -> nn.Module:
    """Of its full-attention layers alone; Gemma 4's own module holds one for each type of layer."""
    rope = config.rope_parameters
    return modeling_qwen3.Qwen3RotaryEmbedding(
        Qwen3Config(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(rope.get("full_attention", rope)),
        )
    )


def _gemma4_value_norm(size: int, eps: float) -> nn.Module:
    return modeling_gemma4.Gemma4RMSNorm(size, eps=eps, with_scale=False)


FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        config_class=Qwen3Config,
        norm=modeling_qwen3.Qwen3RMSNorm,
        mlp=modeling_qwen3.Qwen3MLP,
        rotary=modeling_qwen3.Qwen3RotaryEmbedding,
        apply_rotary=modeling_qwen3.apply_rotary_pos_emb,
    ),
    "gemma4_text": Family(
        config_class=Gemma4TextConfig,
        norm=modeling_gemma4.Gemma4RMSNorm,
        mlp=_gemma4_mlp,
        rotary=_gemma4_rotary,
        apply_rotary=modeling_qwen3.apply_rotary_pos_emb,
        value_norm=_gemma4_value_norm,
        attention_scale=1.0,
        scales_embedding=True,
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
    """The family of a draft's config.

    Raises:
        ConfigError: there are no drafts of this `model_type`.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model_type={config.model_type}: a draft's is one of {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
