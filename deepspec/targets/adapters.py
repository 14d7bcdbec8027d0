"""Where a target's decoder, layers, embedding and head are, and what it does around them.

Transformers gives its causal language models one set of accessors, and its configs one set of names, so one adapter
serves nearly all of them. A family that differs overrides the method that differs and registers itself.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deepspec.config import ConfigError

FINAL_NORMS = ("norm", "final_layernorm", "embedding_norm", "norm_f", "ln_f")
ADAPTERS: dict[str, type[TargetAdapter]] = {}
# Model types whose features, packing and decoding the tests compare with Transformers' own.
TESTED_FAMILIES = frozenset(
    """
    deepseek_v3 gemma2 gemma3_text gemma4_text glm4 glm4_moe gpt_oss granite lfm2 llama ministral3 mistral mixtral
    nemotron_h olmo2 olmo3 phi3 qwen2 qwen3 qwen3_5_text qwen3_moe qwen3_next smollm3
    """.split()  # noqa: SIM905
)


def register_adapter(*model_types: str):
    """Class decorator: make an adapter the one for these model types (of the text model, where that is inside)."""

    def register(adapter: type[TargetAdapter]) -> type[TargetAdapter]:
        ADAPTERS.update(dict.fromkeys(model_types, adapter))
        return adapter

    return register


class TargetAdapter:
    """The layout that Transformers gives causal language models, and the text model inside vision-language ones."""

    @staticmethod
    def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
        return config.get_text_config(decoder=True)

    @staticmethod
    def decoder(model: PreTrainedModel) -> nn.Module:
        """The model without its head; its output `last_hidden_state` is taken after the final norm."""
        return model.get_decoder()

    @classmethod
    def layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        return cast(nn.ModuleList, cls._part(model, "layers", "h"))

    @classmethod
    def final_norm(cls, model: PreTrainedModel) -> nn.Module:
        return cls._part(model, *FINAL_NORMS)

    @staticmethod
    def embedding(model: PreTrainedModel) -> nn.Embedding:
        return cast(nn.Embedding, model.get_input_embeddings())

    @staticmethod
    def head(model: PreTrainedModel) -> nn.Linear:
        return model.get_output_embeddings()

    @staticmethod
    def embedding_scale(config: PreTrainedConfig) -> float:
        """What the rows of the embedding are multiplied by on their way into the first layer, by the text config."""
        return float(getattr(config, "embedding_multiplier", None) or 1.0)

    @staticmethod
    def logit_scale(config: PreTrainedConfig) -> float:
        """What the head's output is multiplied by."""
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
        return float(scale / (getattr(config, "logits_scaling", None) or 1.0))

    @staticmethod
    def final_logit_softcapping(config: PreTrainedConfig) -> float | None:
        """c of the final soft cap c * tanh(logits / c), applied after the scale; None = no cap."""
        return getattr(config, "final_logit_softcapping", None)

    @classmethod
    def _part(cls, model: PreTrainedModel, *names: str) -> nn.Module:
        decoder = cls.decoder(model)
        found = next((part for name in names if isinstance(part := getattr(decoder, name, None), nn.Module)), None)
        if found is None:
            raise ConfigError(
                f"{type(decoder).__name__} has none of {', '.join(names)}: write an adapter for model type "
                f"'{cls.text_config(model.config).model_type}' in deepspec/targets/adapters.py that says where they are"
            )
        return found


@register_adapter("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "vaultgemma")
class GemmaAdapter(TargetAdapter):
    @staticmethod
    def embedding_scale(config: PreTrainedConfig) -> float:
        return config.hidden_size**0.5


def adapter_for(config: PreTrainedConfig) -> type[TargetAdapter]:
    """The adapter of a target's config: its family's own, or the one for all."""
    return ADAPTERS.get(config.get_text_config(decoder=True).model_type, TargetAdapter)
