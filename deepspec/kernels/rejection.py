"""Rejection sampling: which drafted tokens to keep and the token after them, such that the output follows the target.

The two rules on distributions are the meaning. `verify_logits` does the same from the target's logits and never writes
its distributions down: of the slots + 1 of a row the rules need one probability each, and all of them of one alone
(block verification: of all). Reading logits once is a third (of 16 bits) or half (of 32) of the memory traffic of
writing their softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.kernels.dispatch import runs_in_triton
from deepspec.kernels.inversion import distribution_of, sample


class Verdict(NamedTuple):
    """Per row, what a round keeps."""

    accepted: Tensor  # long [rows], drafted tokens kept
    next_token: Tensor  # long [rows], the corrected or the bonus token


def verify_logits(
    rule: str,
    tokens: Tensor,
    draft: Tensor,
    target_logits: Tensor,
    temperatures: Tensor,
    lengths: Tensor | None,
    accept_uniform: Tensor,
    next_uniform: Tensor,
    offsets: Tensor | None = None,
    implementation: str | None = None,
) -> Verdict:
    """A rule of RULES with the target's distributions softmax(logits / temperature), one-hot at temperature 0.

    A row whose target or draft is not finite gets an accepted number and a token within bounds, and no other meaning.

    Args:
        rule: "token" or "block".
        tokens: long [rows, slots], drafted.
        draft: float32 [rows, slots, vocab], what each token was drawn from, the last stride 1.
        target_logits: [positions, vocab], the last stride 1. Slot k of row r is at position offsets[r] + k, and a row
            has one position more than proposed tokens. Rows may follow each other without padding.
        temperatures: float32 [rows], without gaps.
        lengths: long [rows], without gaps, how many tokens of each row are proposed; the others count as not there.
            None = all.
        accept_uniform: float64 [rows, slots], from 0 to below 1.
        next_uniform: float64 [rows], from 0 to below 1.
        offsets: long [rows], without gaps; None = rows of slots + 1 positions, one after the other.
        implementation: "plain" or "triton"; None = triton on a GPU where it is installed.

    Raises:
        ValueError: no such rule or implementation.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule}: must be one of {', '.join(RULES)}")
    (rows, slots), vocab = tokens.shape, target_logits.shape[1]
    assert (draft.shape, draft.dtype) == ((rows, slots, vocab), torch.float32)
    assert draft.stride(2) == target_logits.stride(1) == 1
    assert offsets is not None or len(target_logits) == rows * (slots + 1)
    assert accept_uniform.shape == (rows, slots)
    assert next_uniform.shape == temperatures.shape == (rows,)
    assert all(given is None or given.is_contiguous() for given in (temperatures, lengths, offsets))
    if runs_in_triton(target_logits, implementation):
        from deepspec.kernels import rejection_triton  # imports Triton, which not everybody has

        verdict = rejection_triton.verify_logits(
            rule, tokens, draft, target_logits, temperatures, lengths, accept_uniform, next_uniform, offsets
        )
        return Verdict(*verdict)
    if offsets is None:
        of_rows = target_logits.view(rows, slots + 1, vocab)
    else:
        positions = offsets[:, None] + torch.arange(slots + 1, device=offsets.device)
        of_rows = target_logits[positions.clamp(max=len(target_logits) - 1)]
    target = distribution_of(of_rows, temperatures)
    return RULES[rule](tokens, draft, target, lengths, accept_uniform, next_uniform)


def verify_tokens(
    tokens: Tensor,
    draft: Tensor,
    target: Tensor,
    lengths: Tensor | None,
    accept_uniform: Tensor,
    next_uniform: Tensor,
) -> Verdict:
    """Token verification (Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2).

    Keep x_k with probability min(1, p_t / p_d), left to right; after the first rejection draw from
    norm(max(p_t - p_d, 0)), after none from p_t.

    Args:
        tokens: long [rows, slots], drafted.
        draft: [rows, slots, vocab], what each token was drawn from.
        target: [rows, slots + 1, vocab]
        lengths: long [rows], how many tokens of each row are proposed; the others count as not there. None = all.
        accept_uniform: float64 [rows, slots]
        next_uniform: float64 [rows]
    """
    slots = tokens.shape[1]
    chosen_target, chosen_draft = _chosen(tokens, target[:, :slots], draft)
    keep = accept_uniform * chosen_draft < chosen_target
    if lengths is not None:
        keep = keep & _proposed(slots, lengths)
    accepted = keep.cumprod(1).sum(1)
    return Verdict(accepted, _next_token(draft, target, accepted, lengths, None, next_uniform))


def verify_block(
    tokens: Tensor,
    draft: Tensor,
    target: Tensor,
    lengths: Tensor | None,
    accept_uniform: Tensor,
    next_uniform: Tensor,
) -> Verdict:
    """Block verification (Sun et al. 2024, algorithm 2): keeps at least as many tokens in expectation.

    With p_0 = 1 and p_i = min(1, p_{i-1} p_t(x_i) / p_d(x_i)), the kept length is the last i whose own test passes with
    probability h_i = S_i / (S_i + 1 - p_i), S_i = sum_x max(p_i p_t(x) - p_d(x), 0) at position i + 1, and h_i = p_i
    for the last proposed i. After i < length the next token is drawn from norm(max(p_i p_t - p_d, 0)).

    Arguments as for `verify_tokens`.
    """
    rows, slots = tokens.shape
    device = tokens.device
    if slots == 0:
        accepted = torch.zeros(rows, dtype=torch.long, device=device)
        return Verdict(accepted, _next_token(draft, target, accepted, lengths, None, next_uniform))
    chosen_target, chosen_draft = _chosen(tokens, target[:, :slots], draft)
    ratio = chosen_target / chosen_draft
    prefix = [torch.ones(rows, dtype=torch.float64, device=device)]
    for slot in range(slots):
        prefix.append((prefix[-1] * ratio[:, slot]).clamp(max=1.0))
    survival = torch.stack(prefix, dim=1)  # [rows, slots + 1]

    inner = survival[:, 1:-1]  # [rows, slots - 1], p_i of the i after which another token was drafted
    surplus = (inner[..., None] * target[:, 1:slots].double() - draft[:, 1:].double()).clamp(min=0).sum(-1)
    whole = surplus + 1 - inner
    stopping = torch.where(whole > 0, surplus / whole, 0.0)
    probability = torch.cat([stopping, survival[:, -1:]], dim=1)
    counts = torch.arange(1, slots + 1, device=device)
    if lengths is not None:
        probability = torch.where(counts == lengths[:, None], survival[:, 1:], probability)
        probability = torch.where(_proposed(slots, lengths), probability, 0.0)
    accepted = ((accept_uniform < probability) * counts).amax(1)
    scale = survival.gather(1, accepted[:, None])
    return Verdict(accepted, _next_token(draft, target, accepted, lengths, scale, next_uniform))


RULES: dict[str, Callable[..., Verdict]] = {"token": verify_tokens, "block": verify_block}


def _proposed(slots: int, lengths: Tensor) -> Tensor:
    return torch.arange(slots, device=lengths.device) < lengths[:, None]


def _chosen(tokens: Tensor, target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """The probabilities of the drafted tokens in float64, each [rows, slots]."""
    index = tokens.unsqueeze(-1)
    return target.gather(-1, index).squeeze(-1).double(), draft.gather(-1, index).squeeze(-1).double()


def _next_token(
    draft: Tensor, target: Tensor, accepted: Tensor, lengths: Tensor | None, scale: Tensor | None, uniform: Tensor
) -> Tensor:
    """Draw from norm(max(scale * p_t - p_d, 0)) at the first token not kept; from p_t if all proposed ones were kept.

    `scale` is [rows, 1], None = 1.
    """
    rows = torch.arange(len(accepted), device=accepted.device)
    slots = draft.shape[1]
    at_target = target[rows, accepted].double()
    if slots == 0:
        return sample(at_target, uniform)
    at_draft = draft[rows, accepted.clamp(max=slots - 1)].double()
    residual = ((at_target if scale is None else scale * at_target) - at_draft).clamp_(min=0)
    # A residual of nothing means equal distributions: rounding alone can have rejected, and p_t is right.
    from_target = (accepted == (slots if lengths is None else lengths)) | (residual.sum(-1) <= 0)
    return sample(torch.where(from_target[:, None], at_target, residual), uniform)
