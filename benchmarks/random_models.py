"""A target and a draft of a given shape with random weights, made on the device: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from deepspec.drafts import DSparkModel, build_draft, build_draft_config
from deepspec.targets import Target, load_target

BLOCK_SIZE = 7


def random_target(shape: dict[str, Any] | None, device: torch.device) -> Target:
    """A Qwen3 of this shape, in bfloat16 on a GPU and float32 on a CPU; None = the built-in target, which is trained.

    Args:
        shape: fields of `Qwen3Config`.
    """
    if shape is None:
        return load_target("builtin", device=device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape, tie_word_embeddings=True), dtype=dtype)
    return Target(model, "random")


def random_draft(target: Target, layers: int, layer_ids: Sequence[int], rank: int, anchors: int = 512) -> DSparkModel:
    """A DSpark draft of the target in float32, on its device, with the target's embedding and head."""
    config = build_draft_config(
        target.config,
        algorithm="dspark",
        num_layers=layers,
        block_size=BLOCK_SIZE,
        target_layer_ids=layer_ids,
        mask_token_id=target.vocab_size - 1,
        markov_rank=rank,
        markov_head_type="vanilla",
        confidence_head=True,
        confidence_head_with_markov=True,
        num_anchors=anchors,
    )
    with target.device:
        draft = build_draft(config, target, seed=0)
    assert isinstance(draft, DSparkModel)
    return draft
