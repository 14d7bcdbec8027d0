"""Does the adapter understand a family that the tests do not know? Asked of the model itself, with a few tokens."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from deepspec.config import ConfigError
from deepspec.data.packing import Document, TokenBatch
from deepspec.targets.adapters import TESTED_FAMILIES
from deepspec.targets.target import Target

logger = logging.getLogger(__name__)
TOKENS = 6  # of a probed document


@torch.no_grad()
def probe_family(target: Target) -> None:
    """Compare captured layers, head and packed documents of an unknown family with what Transformers computes.

    Raises:
        ConfigError: they differ; says in what, and which method of the adapter to write.
    """
    if target.config.model_type in TESTED_FAMILIES:
        return
    ids = torch.arange(1, 2 * TOKENS + 1, device=target.device).view(2, TOKENS) % target.vocab_size
    layer_ids = list(range(-1, target.num_layers - 1))
    try:
        reference = target.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        features = target.features(_documents(ids, rows=2), layer_ids)
        packed = target.features(_documents(ids, rows=1), layer_ids)
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
            target.logits(features.final),
            reference.logits.float(),
            "`head`, `logit_scale` and `final_logit_softcapping`",
        ),
        ("documents packed into one row see each other", packed.final.view_as(features.final), features.final, ""),
    ):
        if difference := _difference(ours, theirs):
            raise _unsupported(target, f"{what} ({difference})", method)
    logger.warning(
        "target %s: model type '%s' is not among the tested families; captured layers, head and packing were compared "
        "with Transformers on a few tokens and agree",
        target.name_or_path,
        target.config.model_type,
    )


def _documents(ids: Tensor, rows: int) -> TokenBatch:
    """The two rows of ids as two documents, in as many rows."""
    count, length = ids.shape
    documents = tuple(
        Document(i, row=i if rows > 1 else 0, start=0 if rows > 1 else i * length, length=length) for i in range(count)
    )
    positions = torch.arange(length, device=ids.device).expand(count, -1).reshape(rows, -1)
    ids = ids.reshape(rows, -1)
    return TokenBatch(ids, positions, torch.ones_like(ids, dtype=torch.bool), documents)


def _difference(ours: Tensor, theirs: Tensor) -> str:
    """What differs by more than rounding, or an empty string."""
    if ours.shape != theirs.shape:
        return f"shapes {list(ours.shape)} and {list(theirs.shape)}"
    tolerance = 100 * torch.finfo(theirs.dtype if theirs.is_floating_point() else torch.float32).eps
    largest = float((ours.float() - theirs.float()).abs().max())
    return "" if largest <= tolerance * max(1.0, float(theirs.float().abs().max())) else f"by up to {largest:.2g}"


def _unsupported(target: Target, what: str, method: str) -> ConfigError:
    mend = f"write an adapter that overrides {method}" if method else "it cannot be trained on; ask for support of it"
    return ConfigError(
        f"target.path={target.name_or_path}: model type '{target.config.model_type}' is not supported: {what}; {mend}"
        + (" in deepspec/targets/adapters.py" if method else "")
    )
