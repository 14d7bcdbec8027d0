"""Which proposer a draft needs."""

from __future__ import annotations

from deepspec.decoding.chain import Eagle3Proposer
from deepspec.decoding.proposers import DSparkProposer
from deepspec.drafts import DraftModel, DSparkModel, Eagle3Model
from deepspec.targets import Target


def proposer_of(
    draft: DraftModel, target: Target, *, allow_other_target: bool = False
) -> DSparkProposer | Eagle3Proposer:
    """The proposer of a draft.

    Args:
        allow_other_target: one of other weights but the same shape will do.

    Raises:
        ConfigError: the draft was not made for this target.
    """
    if isinstance(draft, Eagle3Model):
        return Eagle3Proposer(draft, target, allow_other_target=allow_other_target)
    if isinstance(draft, DSparkModel):
        return DSparkProposer(draft, target, allow_other_target=allow_other_target)
    raise TypeError(f"no proposer for a {type(draft).__name__}")
