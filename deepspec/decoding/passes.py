"""One pass of the target over packed tokens in slots."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.decoding.cache import SlotCache, Span
from deepspec.decoding.proposers import Proposer
from deepspec.targets import Target


def target_pass(target: Target, proposer: Proposer | None, cache: SlotCache, span: Span, ids: Tensor) -> Tensor:
    """Run packed tokens through the target, which attends with `SLOTS`; the cache and the proposer take note of them.

    Args:
        span: where the tokens are.
        ids: long [total]

    Returns:
        Final states [total, hidden].
    """
    cache.span = span
    columns = torch.arange(span.end, device=ids.device)
    may_attend = columns <= span.to_rows(span.positions)[..., None]  # [rows, longest, columns]
    layer_ids = tuple(proposer.layer_ids) if proposer else ()
    features = target.forward(ids[None], span.positions[None], may_attend[:, None], cache, layer_ids, span=span)
    if proposer:
        proposer.observe(span, ids, features.context[0])
    return features.final[0]
