"""What a Qwen3-shaped draft takes from the config of a target of any family: sizes of its layers, epsilon, RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from deepspec.config import ConfigError

EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
DEFAULT_EPSILON = 1e-6
DEFAULT_ROPE_BASE = 10_000.0
DEFAULT_POSITIONS = 32_768
USUAL_HEAD_DIM = 128
USUAL_KV_HEADS = 8
SMALL_HIDDEN = 1024  # below it, heads of 128 would be too few
# RoPE types that Transformers and vLLM compute alike for Qwen3 and that do not depend on a row's length: their fields.
KEPT_ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
        *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
    ),
}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a draft's layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


def layer_shape(
    target: PreTrainedConfig,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    intermediate_size: int | None = None,
) -> LayerShape:
    """The sizes that are given, and for the others the target's where they fit a Qwen3 layer.

    They do not fit where the target has latent attention (its head_dim is the rotated part alone), no attention at all,
    or heads of an odd width. Then heads are 128 wide (hidden size / heads in a target narrower than 1024), and as many
    as fill the hidden size. Key/value heads that do not divide the heads, or those of latent attention, become
    the largest divisor up to them, or up to 8. An MLP width that is missing, not one number, or that of a narrow expert
    becomes 3 * hidden size.

    Args:
        target: the text config.

    Raises:
        ConfigError: given sizes that exclude each other.
    """
    layer = target.per_layer_config[0]  # where layers differ (Gemma 4), the config itself refuses to answer
    hidden = layer.hidden_size
    is_latent = getattr(layer, "kv_lora_rank", None) is not None
    its_heads = _whole_number(layer, "num_attention_heads")
    its_width = 0 if is_latent else _whole_number(layer, "head_dim") or _exact_quotient(hidden, its_heads)
    fits = its_heads > 0 and its_width > 0 and its_width % 2 == 0
    width = head_dim or (its_width if fits else _usual_head_dim(hidden, its_heads))
    heads = num_heads or (its_heads if fits else max(1, hidden // width))
    limit = USUAL_KV_HEADS if is_latent else _whole_number(layer, "num_key_value_heads") or heads
    kv_heads = num_kv_heads or _largest_divisor(heads, limit)
    if heads % kv_heads:
        raise ConfigError(
            f"draft.num_kv_heads={kv_heads}: must divide the number of heads, which is {heads}; set draft.num_heads "
            "or draft.num_kv_heads"
        )
    if width % 2:
        raise ConfigError(f"draft.head_dim={width}: must be even, RoPE turns pairs")
    return LayerShape(heads, kv_heads, width, intermediate_size or _mlp_width(layer))


def norm_epsilon(target: PreTrainedConfig) -> float:
    """Of the target's norms, whatever its family calls it."""
    return next((getattr(target, name) for name in EPSILONS if getattr(target, name, None)), DEFAULT_EPSILON)


def plain_rope(target: PreTrainedConfig) -> dict[str, Any]:
    """`rope_parameters` of a draft: one rotation over the whole head, by 1-D positions, with the target's base.

    The target's scaling stays where engines can do it and where it does not depend on a row's length, see
    `KEPT_ROPE_TYPES`. A target with a rotation for each type of layer gives that of full attention.
    """
    rope = getattr(target, "rope_parameters", None) or {}
    if "full_attention" in rope:
        rope = rope["full_attention"] or {}
    elif nested := [value for value in rope.values() if isinstance(value, dict) and "rope_theta" in value]:
        rope = nested[0]
    base = rope.get("rope_theta") or getattr(target, "rope_theta", None) or DEFAULT_ROPE_BASE
    kind = rope.get("rope_type", "default")
    if kind not in KEPT_ROPE_TYPES or "mrope_section" in rope:
        kind = "default"
    scaling = {name: rope[name] for name in KEPT_ROPE_TYPES[kind] if rope.get(name) is not None}
    if "original_max_position_embeddings" in KEPT_ROPE_TYPES[kind]:
        original = scaling.setdefault("original_max_position_embeddings", position_limit(target))
        scaling.setdefault("factor", position_limit(target) / original)
    return {"rope_type": kind, "rope_theta": float(base), **scaling}


def position_limit(target: PreTrainedConfig) -> int:
    """The target's max_position_embeddings."""
    return getattr(target, "max_position_embeddings", None) or DEFAULT_POSITIONS


def _usual_head_dim(hidden: int, heads: int) -> int:
    return USUAL_HEAD_DIM if hidden >= SMALL_HIDDEN or not heads else max(2, hidden // heads // 2 * 2)


def _exact_quotient(hidden: int, heads: int) -> int:
    """0 where there is none."""
    return hidden // heads if heads and hidden % heads == 0 else 0


def _largest_divisor(number: int, limit: int) -> int:
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _mlp_width(target: PreTrainedConfig) -> int:
    width, hidden = _whole_number(target, "intermediate_size"), target.hidden_size
    is_of_an_expert = any(_whole_number(target, name) > 1 for name in EXPERTS) and width < 2 * hidden
    return 3 * hidden if is_of_an_expert else width or 3 * hidden


def _whole_number(config: PreTrainedConfig, name: str) -> int:
    """0 where there is none, or one for each layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
