"""Does the adapter understand a family that the tests do not know? Asked of the model itself, with a few tokens."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from deepspec.config import ConfigError
from deepspec.data.packing import Document, TokenBatch
from deepspec.targets.adapters import TESTED_FAMILIES
from deepspec.targets.attention import attend_with, document_attention
from deepspec.targets.target import Target

logger = logging.getLogger(__name__)
TOKENS = 6  # of a probed document
PROBE = "deepspec_probe"


@torch.no_grad()
def probe_family(target: Target) -> None:
    """Compare captured layers, head and packed documents of an unknown family with what Transformers computes.

    Raises:
        ConfigError: they differ; says in what, and which method of the adapter to write.
    """
    if target.config.model_type in TESTED_FAMILIES:
        return
    _check_windows(target)
    ids = torch.arange(1, 2 * TOKENS + 1, device=target.device).view(2, TOKENS) % target.vocab_size
    layer_ids = list(range(-1, target.num_layers - 1))
    try:
        reference = target.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        features = target.features(as_documents(ids, rows=2), layer_ids)
        packed = target.features(as_documents(ids, rows=1), layer_ids)
    except ConfigError:
        raise
    except Exception as error:
        raise _unsupported(target, f"its forward pass failed with {type(error).__name__}: {error}", "") from error
    states = reference.hidden_states
    if states is None or len(states) != target.num_layers + 1:
        found = "none" if states is None else len(states)
        raise _unsupported(target, f"{target.num_layers} layers gave {found} hidden states", "`layers`")
    for what, ours, theirs, method in (
        ("captured layers differ", features.context, torch.cat(states[:-1], dim=-1), "`layers`"),
        ("the state that its head reads differs", features.final, states[-1], "`decoder` and `final_norm`"),
        (
            "head(final state) differs from its logits",
            target.logits(states[-1]),
            reference.logits,
            "`head`, `logit_scale` and `final_logit_softcapping`",
        ),
        ("documents packed into one row see each other", packed.final.view_as(features.final), features.final, ""),
    ):
        if ours.shape != theirs.shape:
            raise _unsupported(target, f"{what} (shapes {list(ours.shape)} and {list(theirs.shape)})", method)
        if (difference := relative_difference(ours, theirs)) > tolerance(target.dtype):
            raise _unsupported(target, f"{what} (by {difference:.2g} of their size)", method)
    embedded = target.embedding_weight[ids] * target.adapter.embedding_scale(target.config)
    if relative_difference(embedded, states[0]) > tolerance(target.dtype):
        logger.warning(
            "target %s: the input of its first layer is not its embedding times %g; a draft of it reads that all the "
            "same. `embedding_scale` of an adapter says what the rows are multiplied by",
            target.name_or_path,
            target.adapter.embedding_scale(target.config),
        )
    logger.warning(
        "target %s: model type '%s' is not among the tested families; captured layers, head and packing were compared "
        "with Transformers on a few tokens and agree",
        target.name_or_path,
        target.config.model_type,
    )


def as_documents(ids: Tensor, rows: int) -> TokenBatch:
    """The rows of ids as one document each, in as many rows or all in one."""
    count, length = ids.shape
    documents = tuple(
        Document(i, row=i if rows > 1 else 0, start=0 if rows > 1 else i * length, length=length) for i in range(count)
    )
    positions = torch.arange(length, device=ids.device).expand(count, -1).reshape(rows, -1)
    ids = ids.reshape(rows, -1)
    return TokenBatch(ids, positions, torch.ones_like(ids, dtype=torch.bool), documents)


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over that of `theirs`; of what is shown other tokens it is of the order of 1."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-30))


def tolerance(dtype: torch.dtype) -> float:
    """What rounding in a few layers may make of it."""
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def _check_windows(target: Target) -> None:
    """Refuse layers that apply a window by a mask alone: our attention gets none, and a few tokens do not show it.

    Raises:
        ConfigError: the config has windows, and no layer tells its attention of one.
    """
    kinds = set(getattr(target.config, "layer_types", None) or ["sliding_attention"])
    window = getattr(target.config, "sliding_window", None)
    has_windows = bool(window) and getattr(target.config, "use_sliding_window", True) is not False
    if "chunked_attention" in kinds or (has_windows and "sliding_attention" in kinds and not _tells_windows(target)):
        raise _unsupported(target, f"its layers of type {sorted(kinds)} limit what they see by a mask alone", "")


def _tells_windows(target: Target) -> bool:
    """Whether any layer hands a window to its attention function."""
    told: list[int | None] = []

    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        told.append(kwargs.get("sliding_window"))
        return document_attention(*args, **kwargs)

    AttentionInterface.register(PROBE, attention)
    ids = torch.zeros(1, 2, dtype=torch.long, device=target.device)
    try:
        with attend_with(target.config, PROBE, None):
            target.hidden_states([], input_ids=ids, position_ids=torch.arange(2)[None].to(ids.device), use_cache=False)
    except Exception as error:
        raise _unsupported(target, f"its forward pass failed with {type(error).__name__}: {error}", "") from error
    return any(window is not None for window in told)


def _unsupported(target: Target, what: str, method: str) -> ConfigError:
    mend = f"write an adapter that overrides {method}" if method else "it cannot be trained on; ask for support of it"
    return ConfigError(
        f"target.path={target.name_or_path}: model type '{target.config.model_type}' is not supported: {what}; {mend}"
        + (" in deepspec/targets/adapters.py" if method else "")
    )
