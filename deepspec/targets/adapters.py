"""One small class per target family: where its decoder, layers, embedding and head are."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from deepspec.config import near_match

ADAPTERS: dict[str, type[TargetAdapter]] = {}


def register_adapter(model_type: str):
    """Class decorator: make an adapter the one for `model_type`."""

    def register(adapter: type[TargetAdapter]) -> type[TargetAdapter]:
        ADAPTERS[model_type] = adapter
        return adapter

    return register


class TargetAdapter:
    """The layout that Transformers gives most decoder-only models; a family overrides what differs."""

    @staticmethod
    def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
        return config

    @staticmethod
    def decoder(model: PreTrainedModel) -> nn.Module:
        """The model without its head; its output `last_hidden_state` is taken after the final norm."""
        return model.model

    @classmethod
    def layers(cls, model: PreTrainedModel) -> nn.ModuleList:
        return cast(nn.ModuleList, cls.decoder(model).layers)

    @classmethod
    def final_norm(cls, model: PreTrainedModel) -> nn.Module:
        return cast(nn.Module, cls.decoder(model).norm)

    @staticmethod
    def embedding(model: PreTrainedModel) -> nn.Embedding:
        return cast(nn.Embedding, model.get_input_embeddings())

    @staticmethod
    def head(model: PreTrainedModel) -> nn.Linear:
        return model.get_output_embeddings()


@register_adapter("qwen3")
class Qwen3Adapter(TargetAdapter):
    """Qwen3 dense models (0.6B to 32B)."""


@register_adapter("llama")
class LlamaAdapter(TargetAdapter):
    """Llama 2, 3 and models that share its architecture string."""


def adapter_for(config: PreTrainedConfig, path: str) -> type[TargetAdapter]:
    """The adapter of a target's config.

    Raises:
        ValueError: no adapter is registered for its model type.
    """
    if config.model_type not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise ValueError(
            f"target.path={path}: model type '{config.model_type}' is not supported; supported are {known}."
            f"{near_match(config.model_type, ADAPTERS)} A new family is one class in deepspec/targets/adapters.py."
        )
    return ADAPTERS[config.model_type]
