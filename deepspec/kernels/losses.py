"""Cross-entropy and total variation of a draft over the vocabulary (DSpark section 4).

U_k + B_k = [h_k ; e_k] [W_head ; W2]^T is one linear layer, so both losses and their gradients are computed for a few
rows at a time and no tensor of all rows times the vocabulary ever exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_ELEMENTS = {"cpu": 2**19, "cuda": 2**27}  # rows * vocab computed at once


class VocabularyLosses(NamedTuple):
    """Losses of N rows; `ce` and `l1` carry no gradient."""

    loss: Tensor  # scalar: sum of weights * (ce_scale * ce + tv_scale * l1)
    ce: Tensor  # [N] -log p_d(target token)
    l1: Tensor | None  # [N] ||p_d - p_t||_1, from 0 to 2; None without target states


def vocabulary_losses_reference(
    hidden: Tensor,
    latents: Tensor | None,
    head: Tensor,
    markov_w2: Tensor | None,
    targets: Tensor,
    target_hidden: Tensor | None,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
) -> VocabularyLosses:
    """The meaning of `vocabulary_losses`, with every logit in memory."""
    logits = functional.linear(hidden, head).float()
    if latents is not None:
        assert markov_w2 is not None
        logits = logits + functional.linear(latents, markov_w2).float()
    log_probabilities = logits.log_softmax(-1)
    ce = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    loss = ce_scale * ce
    if target_hidden is None:
        return VocabularyLosses((weights * loss).sum(), ce.detach(), None)
    with torch.no_grad():
        target_probabilities = functional.linear(target_hidden, head).float().softmax(-1)
    l1 = (log_probabilities.exp() - target_probabilities).abs().sum(-1)
    return VocabularyLosses((weights * (loss + tv_scale * l1)).sum(), ce.detach(), l1.detach())


def vocabulary_losses(
    hidden: Tensor,
    latents: Tensor | None,
    head: Tensor,
    markov_w2: Tensor | None,
    targets: Tensor,
    target_hidden: Tensor | None,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
    chunk_rows: int | None = None,
) -> VocabularyLosses:
    """Both losses in chunks of rows, in float32 above the matrix products; gradients are ready after the forward pass.

    Args:
        hidden: [N, hidden], gets a gradient.
        latents: [N, rank], gets a gradient; None without a sequential head.
        head: [vocab, hidden], frozen; of the draft and the target alike.
        markov_w2: [vocab, rank], gets a gradient.
        targets: [N] token ids.
        target_hidden: [N, hidden], the target's state that predicts this token; None = no target probabilities, no l1.
        weights: [N]
        ce_scale, tv_scale: of the two losses in `loss`. A tv_scale above 0 needs `target_hidden`.
        chunk_rows: rows at a time; None = what suits the device.
    """
    if tv_scale and target_hidden is None:
        raise ValueError("the total variation needs the target's hidden states: pass target_hidden or tv_scale=0")
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"]) // head.shape[0])
    with_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, latents, markov_w2)
    )
    loss, ce, l1 = _VocabularyLosses.apply(
        hidden,
        latents,
        head,
        markov_w2,
        targets,
        target_hidden,
        weights,
        (ce_scale, tv_scale),
        chunk_rows,
        with_gradient,
    )
    return VocabularyLosses(loss, ce, None if target_hidden is None else l1)


class _VocabularyLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latents: Tensor | None,
        head: Tensor,
        markov_w2: Tensor | None,
        targets: Tensor,
        target_hidden: Tensor | None,
        weights: Tensor,
        scales: tuple[float, float],
        chunk_rows: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ce = torch.zeros(hidden.shape[0], device=hidden.device)
        l1 = torch.zeros_like(ce)
        gradients: list[Tensor | None] = [None, None, None]
        if with_gradient:
            gradients[0] = torch.empty_like(hidden)
            if latents is not None and markov_w2 is not None:
                gradients[1], gradients[2] = torch.empty_like(latents), torch.zeros_like(markov_w2, dtype=torch.float32)
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = functional.linear(hidden[rows], head).float()
            if latents is not None and markov_w2 is not None:
                logits += functional.linear(latents[rows], markov_w2)
            probabilities, ce[rows] = _softmax_and_cross_entropy(logits, targets[rows])
            difference = None
            if target_hidden is not None:
                target_logits = functional.linear(target_hidden[rows].to(head.dtype), head).float()
                difference = probabilities - target_logits.softmax(-1)
                l1[rows] = difference.abs().sum(-1)
            if not with_gradient:
                continue
            gradient = _logit_gradient(probabilities, difference, targets[rows], weights[rows].float(), *scales)
            gradient = gradient.to(head.dtype)
            gradients[0][rows] = gradient @ head  # type: ignore[index]
            if latents is not None and markov_w2 is not None:
                gradients[1][rows] = gradient @ markov_w2  # type: ignore[index]
                gradients[2] += gradient.T @ latents[rows].to(gradient.dtype)  # type: ignore[operator]
        if gradients[2] is not None and markov_w2 is not None:
            gradients[2] = gradients[2].to(markov_w2.dtype)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(ce, l1)
        return (weights * (scales[0] * ce + scales[1] * l1)).sum(), ce, l1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, latents, markov_w2 = (
            None if saved is None else saved * upstream.to(saved.dtype) for saved in ctx.saved_tensors
        )
        return hidden, latents, None, markov_w2, None, None, None, None, None, None


def _softmax_and_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrites `logits` with the probabilities [rows, vocab]; cross-entropy [rows]."""
    logits.sub_(logits.amax(-1, keepdim=True))
    of_target = logits.gather(1, targets[:, None]).squeeze(1)
    logits.exp_()
    total = logits.sum(-1, keepdim=True)
    return logits.div_(total), total.squeeze(1).log() - of_target


def _logit_gradient(
    probabilities: Tensor, difference: Tensor | None, targets: Tensor, weights: Tensor, ce_scale: float, tv_scale: float
) -> Tensor:
    """Gradient of weights * (ce_scale * ce + tv_scale * l1) for the logits; overwrites its inputs.

    d ce / dz = p - onehot; d l1 / dz = p * (s - <s, p>) with s = sign(p - p_t).
    """
    if tv_scale and difference is not None:
        sign = difference.sign_()
        mean_sign = torch.linalg.vecdot(sign, probabilities)
        sign.mul_(tv_scale * weights[:, None]).add_((weights * (ce_scale - tv_scale * mean_sign))[:, None])
        gradient = sign.mul_(probabilities)
    else:
        gradient = probabilities.mul_(ce_scale * weights[:, None])
    return gradient.scatter_add_(1, targets[:, None], (-ce_scale * weights)[:, None])
