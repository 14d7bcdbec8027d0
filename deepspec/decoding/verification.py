"""Which drafted tokens to keep, and the token after them, such that the output follows the target exactly.

The rules take the distributions that the tokens were drawn from (draft) and would have been drawn from (target); at
temperature 0 all come down to `verify_greedy`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepspec.kernels.rejection import RULES, Verdict, verify_block, verify_tokens

__all__ = ["VERIFICATION_RULES", "Verdict", "VerificationRule", "verify_block", "verify_greedy", "verify_tokens"]

VerificationRule = Callable[[Tensor, Tensor, Tensor, "Tensor | None", Tensor, Tensor], Verdict]
VERIFICATION_RULES: dict[str, VerificationRule] = RULES


def verify_greedy(tokens: Tensor, best: Tensor, lengths: Tensor | None) -> Verdict:
    """Keep drafted tokens while they are the target's most likely ones.

    Args:
        tokens: long [rows, slots], drafted.
        best: long [rows, slots + 1], the target's argmax.
        lengths: long [rows], how many tokens of each row are proposed; None = all.
    """
    keep = tokens == best[:, :-1]
    if lengths is not None:
        keep = keep & (torch.arange(tokens.shape[1], device=lengths.device) < lengths[:, None])
    accepted = keep.cumprod(1).sum(1)
    return Verdict(accepted, best.gather(1, accepted[:, None]).squeeze(1))
