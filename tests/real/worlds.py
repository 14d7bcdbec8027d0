"""Drafts and inputs that the tests against real engines share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from deepspec.data.packing import Sample, lay_out
from deepspec.drafts import build_draft, build_draft_config
from deepspec.drafts.base import DraftModel
from deepspec.targets import Target, TargetFeatures

BUILTIN = Path(__file__).parent.parent.parent / "deepspec" / "targets" / "builtin_weights"
EVERY_FIFTH = torch.arange(0, 2048, 5)  # a vocabulary of a draft
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write a haiku about rain.",
    "Explain in two sentences why the sky is blue.",
    "Give me a recipe for pancakes.",
    "How do I reverse a list in Python?",
    "Translate 'good morning' to Spanish.",
    "What is 12 times 12?",
)


def random_draft(target: Target, kept_tokens: Tensor | None = None, **changes: Any) -> DraftModel:
    """A draft of the target in which no weight is zero or one, so that nothing hides; it can propose those tokens."""
    settings: dict[str, Any] = {
        "algorithm": "dspark",
        "num_layers": 2,
        "block_size": 7,
        "target_layer_ids": [1, 3, 4],
        "mask_token_id": target.vocab_size - 1,
        "markov_rank": 32,
        "markov_head_type": "vanilla",
        "confidence_head": True,
        "confidence_head_with_markov": True,
        "num_anchors": 4,
    }
    if kept_tokens is not None:
        settings["draft_vocab_size"] = len(kept_tokens)
    config = build_draft_config(target.config, **(settings | changes))
    draft = build_draft(config, target, kept_tokens=kept_tokens)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, weight in draft.trainable_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if weight.ndim == 1 else noise / weight.shape[-1] ** 0.5)
    return draft.eval()


def texts(target: Path) -> list[list[int]]:
    """Three documents of token ids, a few hundred each."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    return [tokenizer(" ".join(QUESTIONS[i:]) * 4, add_special_tokens=False)["input_ids"] for i in range(3)]


def features_of_text(target: Target, layer_ids: Sequence[int], length: int = 64) -> tuple[Tensor, TargetFeatures]:
    """Token ids [3, length] and the built-in target's features of them."""
    rows = [[Sample(i, 0, str(i), ids[:length], [1] * length)] for i, ids in enumerate(texts(BUILTIN))]
    batch = lay_out(rows, pad_id=0)
    return batch.input_ids, target.features(batch, layer_ids)
