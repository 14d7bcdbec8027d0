"""What the config of an Eagle3 draft holds beside what every draft's does (EAGLE-3, arXiv 2503.01840)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from deepspec.config import ConfigError

EAGLE3 = "eagle3"
QWEN3_EAGLE3, LLAMA_EAGLE3 = "Qwen3Eagle3Model", "LlamaEagle3Model"
# By model_type. The Llama shape has no query and key norms, which SGLang's Eagle3 lacks; vLLM has both shapes.
EAGLE3_ARCHITECTURES = {"qwen3": QWEN3_EAGLE3, "llama": LLAMA_EAGLE3}
ALSO_READ = "Eagle3DraftModel"  # of either model_type
READABLE = frozenset({*EAGLE3_ARCHITECTURES.values(), ALSO_READ})


def is_eagle3(config: PreTrainedConfig) -> bool:
    """By its architecture, or by `draft_algorithm` where a config was not saved yet."""
    named = set(getattr(config, "architectures", None) or [])
    return bool(named & READABLE) or getattr(config, "draft_algorithm", None) == EAGLE3


def architecture_of(config: PreTrainedConfig) -> str:
    """The class of an Eagle3 draft. Raises ConfigError: there is none of this `model_type`."""
    if config.model_type not in EAGLE3_ARCHITECTURES:
        allowed = ", ".join(EAGLE3_ARCHITECTURES)
        raise ConfigError(f"model_type={config.model_type}: an Eagle3 draft's is one of {allowed}")
    return EAGLE3_ARCHITECTURES[config.model_type]


def own_fields(ttt_length: int, step_loss_decay: float) -> dict[str, Any]:
    """To be written."""
    return {"ttt_length": ttt_length, "step_loss_decay": step_loss_decay, "draft_num_hidden_layers": 1}


def own_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `DraftSettings` that an Eagle3 config fills otherwise than a DSpark config.

    Raises:
        ConfigError: a field is missing, or it asks for what DeepSpec does not have.
    """
    missing = [key for key in ("ttt_length", "target_layer_ids") if getattr(config, key, None) is None]
    if missing:
        raise ConfigError(f"not the config of an Eagle3 draft: {', '.join(missing)} missing")
    if config.num_hidden_layers != 1:
        raise ConfigError(f"num_hidden_layers={config.num_hidden_layers}: an Eagle3 draft has one layer here")
    # EAGLE 3.1 and the variants of `speculators`; published DeepSpec drafts have none of them.
    for key in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if getattr(config, key, False):
            raise ConfigError(f"{key}=true: DeepSpec has no such Eagle3 draft")
    return {
        "algorithm": EAGLE3,
        "block_size": config.ttt_length,
        "sample_from_anchor": True,
        "mask_token_id": None,
        "markov_rank": 0,
        "markov_head_type": "vanilla",
        "confidence_head": False,
        "confidence_head_with_markov": False,
    }


def check_settings(num_layers: int, architecture: str, sliding_window: int | None) -> None:
    """Refuse what an Eagle3 draft cannot be. Raises ConfigError."""
    for key, value, only in (
        ("num_layers", num_layers, (1,)),
        ("architecture", architecture, tuple(EAGLE3_ARCHITECTURES.values())),
        ("sliding_window", sliding_window, (None,)),
    ):
        if value not in only:
            allowed = " or ".join("null" if one is None else str(one) for one in only)
            raise ConfigError(
                f"draft.{key}={value}: with draft.algorithm=eagle3 it can only be {allowed}; choose the group with "
                "draft=eagle3, or set it"
            )
