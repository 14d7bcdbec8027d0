"""A tiny random target of every family, built from Transformers' own config classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

WINDOW = 6  # tokens, of the sliding layers
BASE: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
DELTA_NET: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# model_type -> config class and what differs from BASE.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "ministral3": ("Ministral3Config", {"sliding_window": WINDOW}),
    "smollm3": (
        "SmolLM3Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL},
    ),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.5, "residual_multiplier": 0.7, "attention_multiplier": 0.4},
    ),
    "glm4": ("Glm4Config", {"partial_rotary_factor": 0.5}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": WINDOW,
            "layer_types": SLIDING_AND_FULL,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL}),
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": SLIDING_AND_FULL,
            "final_logit_softcapping": 4.0,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 1,
            "global_head_dim": 16,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": SLIDING_AND_FULL,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW}),
    "glm4_moe": ("Glm4MoeConfig", ROUTED),
    "qwen3_next": ("Qwen3NextConfig", DELTA_NET | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_5_text": ("Qwen3_5TextConfig", DELTA_NET),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        ROUTED
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 12,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 10,
            "v_head_dim": 14,
            "head_dim": 8,
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention", "mamba", "mlp", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "conv_kernel": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
}
# Vision-language wrapper -> the family of the text model inside.
WRAPPERS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text", "mistral3": "mistral"}
WRAPPER_CONFIGS = {
    "gemma3": "Gemma3Config",
    "gemma4": "Gemma4Config",
    "qwen3_5": "Qwen3_5Config",
    "mistral3": "Mistral3Config",
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
HYBRIDS = ("qwen3_next", "qwen3_5_text", "lfm2", "nemotron_h")


def family_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a family or wrapper; `changes` go to the text config."""
    if family in WRAPPERS:
        text = family_config(WRAPPERS[family], **changes)
        vision = {"vision_config": VISION} if family in ("gemma3", "mistral3") else {}
        return getattr(transformers, WRAPPER_CONFIGS[family])(
            text_config=text.to_dict(), tie_word_embeddings=False, initializer_range=0.3, **vision
        )
    config_class, settings = FAMILIES[family]
    settings = BASE | settings | changes
    return getattr(transformers, config_class)(**settings, vocab_size_per_layer_input=settings["vocab_size"])


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model in float32 in evaluation mode, whose output depends sharply on every token it reads."""
    config = family_config(family, **changes)
    loader = AutoModelForImageTextToText if family == "mistral3" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = loader.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith("sinks"):
                parameter.data.normal_()
            elif name.endswith("dt_bias"):  # time steps on both sides of the limit that Transformers puts to some
                parameter.data.fill_(-8.0)
    return model
