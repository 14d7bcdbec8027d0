"""Which drafted tokens to keep, and the token after them, such that the output follows the target exactly.

Both rules take the distributions that the tokens were drawn from (draft) and would have been drawn from (target).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepspec.decoding.sampling import sample


@dataclass(frozen=True)
class Verdict:
    accepted: Tensor  # long [rows], drafted tokens kept
    next_token: Tensor  # long [rows], the corrected or the bonus token


VerificationRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Verdict]


def verify_tokens(
    tokens: Tensor, draft: Tensor, target: Tensor, lengths: Tensor, accept_uniform: Tensor, next_uniform: Tensor
) -> Verdict:
    """Token verification (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    Keep x_k with probability min(1, p_t / p_d), left to right; after the first rejection draw from
    norm(max(p_t - p_d, 0)), after none from p_t.

    Args:
        tokens: long [rows, slots], drafted.
        draft: [rows, slots, vocab], what each token was drawn from.
        target: [rows, slots + 1, vocab]
        lengths: long [rows], how many tokens of each row are proposed; the others count as not there.
        accept_uniform: float64 [rows, slots]
        next_uniform: float64 [rows]
    """
    slots = tokens.shape[1]
    drawn = tokens.unsqueeze(-1)
    chosen_target = target[:, :slots].gather(-1, drawn).squeeze(-1).double()
    chosen_draft = draft.gather(-1, drawn).squeeze(-1).double()
    keep = (accept_uniform * chosen_draft < chosen_target) & _proposed(slots, lengths)
    accepted = keep.long().cumprod(1).sum(1)
    scale = torch.ones_like(next_uniform)
    return Verdict(accepted, _next_token(draft, target, accepted, lengths, scale, next_uniform))


def verify_block(
    tokens: Tensor, draft: Tensor, target: Tensor, lengths: Tensor, accept_uniform: Tensor, next_uniform: Tensor
) -> Verdict:
    """Block verification (Sun et al. 2024, algorithm 2): keeps at least as many tokens in expectation.

    With p_0 = 1 and p_i = min(1, p_{i-1} p_t(x_i) / p_d(x_i)), the kept length is the last i whose own test passes with
    probability h_i = S_i / (S_i + 1 - p_i), S_i = sum_x max(p_i p_t(x) - p_d(x), 0) at position i + 1, and h_i = p_i for
    the last proposed i. After i < length the next token is drawn from norm(max(p_i p_t - p_d, 0)).

    Arguments as for `verify_tokens`.
    """
    rows, slots = tokens.shape
    drawn = tokens.unsqueeze(-1)
    chosen_target = target[:, :slots].gather(-1, drawn).squeeze(-1).double()
    chosen_draft = draft.gather(-1, drawn).squeeze(-1).double()
    ratio = chosen_target / chosen_draft
    prefix = [torch.ones(rows, dtype=torch.float64, device=tokens.device)]
    for slot in range(slots):
        prefix.append((prefix[-1] * ratio[:, slot]).clamp(max=1.0))
    survival = torch.stack(prefix, dim=1)  # [rows, slots + 1]
    passes = torch.zeros(rows, slots, dtype=torch.bool, device=tokens.device)
    for count in range(1, slots + 1):  # the test that keeps exactly the first `count` tokens or more
        probability = survival[:, count]
        if count < slots:
            surplus = (probability[:, None] * target[:, count].double() - draft[:, count].double()).clamp(min=0).sum(-1)
            whole = surplus + 1 - probability
            inner = torch.where(whole > 0, surplus / whole, 0.0)
            probability = torch.where(lengths == count, probability, inner)
        passes[:, count - 1] = accept_uniform[:, count - 1] < probability
    passes &= _proposed(slots, lengths)
    counts = torch.arange(1, slots + 1, device=tokens.device)
    accepted = (passes * counts).amax(1) if slots else torch.zeros_like(lengths)
    scale = survival.gather(1, accepted[:, None]).squeeze(1)
    return Verdict(accepted, _next_token(draft, target, accepted, lengths, scale, next_uniform))


VERIFICATION_RULES: dict[str, VerificationRule] = {"token": verify_tokens, "block": verify_block}


def _proposed(slots: int, lengths: Tensor) -> Tensor:
    return torch.arange(slots, device=lengths.device) < lengths[:, None]


def _next_token(
    draft: Tensor, target: Tensor, accepted: Tensor, lengths: Tensor, scale: Tensor, uniform: Tensor
) -> Tensor:
    """Draw from norm(max(scale * p_t - p_d, 0)) at the first token not kept; from p_t if all proposed ones were kept."""
    rows = torch.arange(len(accepted), device=accepted.device)
    at_target = target[rows, accepted].double()
    if draft.shape[1] == 0:
        return sample(at_target, uniform)
    at_draft = draft[rows, accepted.clamp(max=draft.shape[1] - 1)].double()
    residual = (scale[:, None] * at_target - at_draft).clamp(min=0)
    # A residual of nothing means equal distributions: rounding alone can have rejected, and p_t is right.
    from_target = (accepted == lengths) | (residual.sum(-1) <= 0)
    return sample(torch.where(from_target[:, None], at_target, residual), uniform)
