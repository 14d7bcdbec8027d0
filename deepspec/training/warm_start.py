"""`train.start_from`: begin with the weights of a draft that is there already, and a fresh optimizer.

The run's own settings decide the draft's shape, as in any run; where they leave something open (null), the earlier
draft decides. A setting that says otherwise than the earlier draft is refused, never overruled.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from deepspec.config import ConfigError, DraftConfig
from deepspec.drafts import DraftModel, DraftSettings, build_draft
from deepspec.drafts.base import TargetWeights
from deepspec.drafts.configuration import ARCHITECTURES
from deepspec.drafts.eagle3_configuration import architecture_of as eagle3_architecture_of
from deepspec.drafts.eagle3_configuration import is_eagle3
from deepspec.drafts.families import head_dim_of
from deepspec.drafts.loading import find_draft_folder, read_draft, read_draft_config

logger = logging.getLogger(__name__)

KEY = "train.start_from"


def filled_in(draft: DraftConfig, start_from: str | None) -> DraftConfig:
    """The run's settings of the draft, with those of the earlier draft where they are null."""
    if start_from is None:
        return draft
    config = read_draft_config(find_draft_folder(start_from, key=KEY))
    settings = DraftSettings.of(config)
    earlier: dict[str, object] = {
        "target_layer_ids": list(settings.target_layer_ids),
        "mask_token_id": settings.mask_token_id,
        "vocab_size": settings.draft_vocab_size,
    }
    if config.model_type == "qwen3" or is_eagle3(config):  # the only ones whose sizes can be set
        earlier |= _sizes(config)
    open_keys: dict[str, Any] = {key: value for key, value in earlier.items() if getattr(draft, key) is None}
    return replace(draft, **open_keys)


def _sizes(config: PreTrainedConfig) -> dict[str, object]:
    return {
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim_of(config),
        "intermediate_size": config.intermediate_size,
    }


def check_settings(config: PreTrainedConfig, start_from: str) -> None:
    """Compare the config of the run's draft with that of the earlier one. Reads no weights.

    Raises:
        ConfigError: they differ; with the settings to give.
        FileNotFoundError, ValueError: no such draft.
    """
    ours, theirs = (_settings(c) for c in (config, read_draft_config(find_draft_folder(start_from, key=KEY))))
    differing = {key: value for key, value in theirs.items() if ours[key] != value}
    if differing:
        listed = "; ".join(f"{key} is {_shown(ours[key])}, the draft has {_shown(differing[key])}" for key in differing)
        words = " ".join(f"{key}={_shown(value)}" for key, value in differing.items())
        raise ConfigError(f"{KEY}={start_from}: this draft has other settings: {listed}. Give {words}")


def _settings(config: PreTrainedConfig) -> dict[str, object]:
    """What `draft.*` says about a draft, by its keys. A head's details count only where there is that head."""
    settings = DraftSettings.of(config)
    read: dict[str, object] = {
        "draft.architecture": (
            eagle3_architecture_of(config) if is_eagle3(config) else ARCHITECTURES[config.model_type]
        ),
        "draft.algorithm": settings.algorithm,
        "draft.num_layers": config.num_hidden_layers,
        "draft.block_size": None if is_eagle3(config) else settings.block_size,
        "draft.sample_from_anchor": settings.sample_from_anchor,
        "draft.ttt_length": settings.block_size if is_eagle3(config) else None,
        "draft.target_layer_ids": list(settings.target_layer_ids),
        "draft.mask_token_id": settings.mask_token_id,
        "draft.markov_rank": settings.markov_rank,
        "draft.markov_head_type": settings.markov_head_type if settings.markov_rank else None,
        "draft.confidence_head": settings.confidence_head,
        "draft.confidence_head_with_markov": settings.confidence_head_with_markov,
        "draft.sliding_window": settings.context_window,
        "draft.vocab_size": settings.draft_vocab_size,
    }
    return read


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value).replace(" ", "")


@torch.no_grad()
def started_from(start_from: str, config: PreTrainedConfig, target: TargetWeights, seed: int) -> DraftModel:
    """A draft of this config with the trained weights and the vocabulary of an earlier one, and the embedding and head
    of its own target.

    Raises:
        ConfigError: the weights have other names or shapes: the earlier draft was made for another kind of target.
    """
    earlier = read_draft(find_draft_folder(start_from, key=KEY), dtype=torch.float32, lender=target)
    draft = build_draft(config, target, seed=seed, kept_tokens=earlier.kept_tokens)
    ours, theirs = dict(draft.trainable_parameters()), dict(earlier.trainable_parameters())
    shapes = [{name: list(weight.shape) for name, weight in weights.items()} for weights in (ours, theirs)]
    if shapes[0] != shapes[1]:
        name = next(name for name in sorted({**ours, **theirs}) if shapes[0].get(name) != shapes[1].get(name))
        raise ConfigError(
            f"{KEY}={start_from}: {name} is {shapes[1].get(name, 'not there')}, and {shapes[0].get(name, 'not there')} "
            "in a draft of this target with these draft.* settings; the two do not fit together"
        )
    for name, weight in ours.items():
        weight.copy_(theirs[name])
    _note_other_target(draft.config, earlier.config, start_from)
    return draft


def _note_other_target(ours: PreTrainedConfig, theirs: PreTrainedConfig, start_from: str) -> None:
    recorded = getattr(theirs, "target_fingerprint", None)
    if recorded is not None and recorded != ours.target_fingerprint:
        logger.warning(
            "%s=%s was trained for target %s with fingerprint %s; it goes on with %s, fingerprint %s, whose embedding "
            "and head it gets",
            KEY,
            start_from,
            getattr(theirs, "target_model_name_or_path", None),
            recorded[:12],
            ours.target_model_name_or_path,
            ours.target_fingerprint[:12],
        )
