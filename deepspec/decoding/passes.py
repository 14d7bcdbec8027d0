"""One pass of the target over packed tokens in slots."""

from __future__ import annotations

from torch import Tensor

from deepspec.decoding.attention import SLOTS
from deepspec.decoding.cache import SlotCache
from deepspec.decoding.proposers import Proposer
from deepspec.decoding.span import Span
from deepspec.targets import Target, attend_with


def target_pass(
    target: Target, proposer: Proposer | None, cache: SlotCache, span: Span, ids: Tensor, *, is_certain: bool
) -> Tensor:
    """Run packed tokens through the target; the cache and the proposer take note of them.

    Args:
        span: where the tokens are.
        ids: long [total]
        is_certain: all of them will be kept; else `cache.keep` has to be told how many.

    Returns:
        Final states [total, hidden].
    """
    layer_ids = tuple(proposer.layer_ids) if proposer else ()
    with attend_with(target.config, SLOTS, span), cache.during(span, is_certain=is_certain):
        features = target.forward(ids[None], span.positions[None], cache, layer_ids)
    if proposer:
        proposer.observe(span, ids, features.context[0])
    return features.final[0]
