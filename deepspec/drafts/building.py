"""Which class a draft's config means, which tensors it has, and fresh drafts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from deepspec.drafts.base import DraftModel, TargetWeights
from deepspec.drafts.configuration import architecture_of
from deepspec.drafts.dspark import DFlashDraftModel, Gemma4DSparkModel, LlamaDSparkModel, Qwen3DSparkModel
from deepspec.drafts.eagle3 import LlamaEagle3Model, Qwen3Eagle3Model
from deepspec.text import some

CLASSES: dict[str, type[DraftModel]] = {
    draft_class.__name__: draft_class
    for draft_class in (
        Qwen3DSparkModel,
        DFlashDraftModel,
        Gemma4DSparkModel,
        LlamaDSparkModel,
        Qwen3Eagle3Model,
        LlamaEagle3Model,
    )
}


def draft_class(config: PreTrainedConfig) -> type[DraftModel]:
    """The class of a draft with this config. Raises ConfigError: there is none."""
    return CLASSES[architecture_of(config)]


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a draft with this config. Makes no weights."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in draft_class(config)(config).state_dict().items()}


def shape_problems(
    stored: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], optional: Collection[str] = ()
) -> list[str]:
    """In what stored tensors differ from the expected ones, a line each; empty if in nothing.

    Args:
        optional: names that may be missing.
    """
    problems = []
    if missing := sorted(expected.keys() - stored.keys() - set(optional)):
        problems.append(f"tensors missing for its config.json: {some(missing)}")
    if unknown := sorted(stored.keys() - expected.keys()):
        problems.append(f"tensors that its config.json does not know: {some(unknown)}")
    wrong = [
        f"{name} is {[*stored[name]]}, expected {[*shape]}"
        for name, shape in sorted(expected.items())
        if name in stored and [*stored[name]] != [*shape]
    ]
    if wrong:
        problems.append(f"shapes do not fit its config.json: {some(wrong)}")
    return problems


def build_draft(
    config: PreTrainedConfig, target: TargetWeights | None = None, *, seed: int = 0, kept_tokens: Tensor | None = None
) -> DraftModel:
    """A fresh draft in float32 with seeded weights and, given a target, its embedding and head.

    Args:
        kept_tokens: what it can propose, see `DraftVocabulary.keep_tokens`; for a draft that cannot propose all.

    Raises:
        ConfigError: no draft for this family.
        ValueError: `target` does not fit the config.
    """
    chosen = draft_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = chosen(config)
    if kept_tokens is not None:
        draft.keep_tokens(kept_tokens)
    if target is not None:
        draft.tie_to_target(target)
    return draft
