"""Cross-entropy and total variation of a draft over the vocabulary (DSpark section 4).

U_k + B_k = [h_k ; e_k] [W_head ; W2]^T is one linear layer, so both losses and their gradients are computed for a few
rows at a time and no tensor of all rows times the vocabulary ever exists. The matrix products are PyTorch's; what
happens between them is here in plain PyTorch, and in `losses_triton` in one kernel.

Where the target scales its logits, U, B and the target's logits are scaled alike; where it caps them, so are U and the
target's, before B is added: z = c * tanh(U / c) + B.

A draft may know a part of the vocabulary. The target's probability of the rest counts in the distance as what the draft
can never have accepted. It is computed as one more token, which the target may say (with the probability of all that
the draft does not know) and the draft never does (its logit is -inf).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK_ROWS = {"cpu": 256, "cuda": 512}  # with more the matrix products are hardly faster
ALIGNMENT = 8  # elements; fast matrix products want rows to begin at multiples of it
CONVERTED_ELEMENTS = 2**22  # of a table that is in another dtype than the matrix products
# Elements of a tensor, for each CPU core (elsewhere all at once), that the next operation should still find in a cache.
CACHED_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}


class Steps(NamedTuple):
    """What happens to the logits between the matrix products, in one implementation."""

    losses_of_rows: Callable[..., None]
    soft_cap: Callable[[Tensor, float], Tensor]  # in place
    multiply_by_slope: Callable[[Tensor, Tensor, float], None]


class VocabularyLosses(NamedTuple):
    """Losses of N rows; `ce` and `l1` carry no gradient."""

    loss: Tensor  # scalar: sum of weights * (ce_scale * ce + tv_scale * l1)
    ce: Tensor  # [N] -log p_d(target token), 0 where it is none of the draft's; or -sum p_t log p_d, see `targets`
    l1: Tensor | None  # [N] ||p_d - p_t||_1, from 0 to 2; None without target states


def vocabulary_losses_reference(
    hidden: Tensor,
    latents: Tensor | None,
    head: Tensor,
    markov_w2: Tensor | None,
    targets: Tensor | None,
    target_hidden: Tensor | None,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kept: Tensor | None = None,
    target_head: Tensor | None = None,
) -> VocabularyLosses:
    """The meaning of `vocabulary_losses`, with every logit in memory."""

    def logits_of(states: Tensor, head: Tensor) -> Tensor:
        scaled = _scaled(functional.linear(states.to(head.dtype), head).float(), logit_scale)
        return scaled if softcap is None else soft_cap(scaled, softcap)

    logits = logits_of(hidden, head)
    if latents is not None and markov_w2 is not None:
        bias = functional.linear(latents.to(head.dtype), markov_w2.to(head.dtype)).float()
        logits = logits + _scaled(bias, logit_scale)
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    if target_hidden is not None:
        with torch.no_grad():
            target_probabilities = logits_of(target_hidden, head if target_head is None else target_head).softmax(-1)
    if targets is None:
        known = target_probabilities if kept is None else target_probabilities[:, kept]
        ce = -(known * log_probabilities).sum(-1)
    else:
        of_targets = log_probabilities.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        ce = torch.where(targets < 0, 0.0, -of_targets)
    loss = ce_scale * ce
    if target_hidden is None:
        return VocabularyLosses((weights * loss).sum(), ce.detach(), None)
    if kept is not None:
        probabilities = torch.zeros_like(target_probabilities).index_copy(1, kept, probabilities)
    l1 = (probabilities - target_probabilities).abs().sum(-1)
    return VocabularyLosses((weights * (loss + tv_scale * l1)).sum(), ce.detach(), l1.detach())


def vocabulary_losses(
    hidden: Tensor,
    latents: Tensor | None,
    head: Tensor,
    markov_w2: Tensor | None,
    targets: Tensor | None,
    target_hidden: Tensor | None,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    kept: Tensor | None = None,
    target_head: Tensor | None = None,
    chunk_rows: int | None = None,
    implementation: str | None = None,
) -> VocabularyLosses:
    """Both losses in chunks of rows; the gradients are ready after the forward pass.

    The logits and all that is done with them are float32, whatever the inputs are and also under autocast, and so is
    the sum over chunks that becomes the gradient of `markov_w2`. The operands of the matrix products are float32 too,
    except for a bf16 or float16 `head` on CUDA, to whose dtype the others are converted. Memory beyond inputs and
    gradients is two tensors of [chunk_rows, vocab], with such a head half of one more, and of a draft that knows a part
    of the vocabulary one of the whole; no head is ever copied. With a soft cap the head's product of the draft is
    computed a second time, for the slope of the cap.

    Args:
        hidden: [N, hidden], gets a gradient.
        latents: [N, rank], gets a gradient; None without a sequential head.
        head: [vocab, hidden], frozen; of the draft, and of the target too unless that has a `target_head`.
        markov_w2: [vocab, rank], gets a gradient; None without a sequential head.
        targets: [N] rows of the head; -1 = a token that the draft does not know: no cross-entropy. None = the
            cross-entropy is that of the target's distribution, Eagle3's, over the tokens that the draft knows.
        target_hidden: [N, hidden], the target's state that predicts this token; None = no target probabilities, no l1.
        weights: [N]
        ce_scale, tv_scale: of the two losses in `loss`. A tv_scale above 0 needs `target_hidden`, as do no `targets`.
        logit_scale: factor of all logits.
        softcap: c in c * tanh(logit / c), of the head's logits; None = off.
        kept: [vocab], where the head's tokens are in the target's vocabulary; None = the two are the same.
        target_head: [vocab of the target, hidden], frozen; needed with `kept` and `target_hidden`.
        chunk_rows: at most so many rows at a time; None = what suits the device.
        implementation: "reference", "chunked" or "triton"; None = triton on a GPU where it is installed, else chunked.
    """
    if (tv_scale or targets is None) and target_hidden is None:
        raise ValueError("the loss needs the target's distribution: pass target_hidden, or tv_scale=0 and targets")
    inputs = (hidden, latents, head, markov_w2, targets, target_hidden, weights)
    settings = (ce_scale, tv_scale, logit_scale, softcap, kept, target_head)
    device = hidden.device.type
    if implementation is None:
        implementation = "triton" if device == "cuda" and find_spec("triton") else "chunked"
    if implementation == "reference":
        return vocabulary_losses_reference(*inputs, *settings)
    trained = (hidden, latents, markov_w2)
    steps = _fused_steps() if implementation == "triton" else PLAIN_STEPS
    if targets is None:
        steps = steps._replace(losses_of_rows=partial(soft_losses_of_rows, known=len(head)))
    with_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        losses, gradients = _losses_and_gradients(
            *inputs,
            *settings,
            chunk_rows=chunk_rows or CHUNK_ROWS.get(device, CHUNK_ROWS["cuda"]),
            steps=steps,
            with_gradient=with_gradient,
        )
    return losses._replace(loss=_WithGradients.apply(losses.loss, gradients, *trained)) if with_gradient else losses


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients for some tensors are known already."""

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, gradients: list[Tensor | None], *_: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return scalar.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if saved is None else saved * upstream.to(saved.dtype) for saved in ctx.saved_tensors)


def _losses_and_gradients(
    hidden: Tensor,
    latents: Tensor | None,
    head: Tensor,
    markov_w2: Tensor | None,
    targets: Tensor | None,
    target_hidden: Tensor | None,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
    logit_scale: float,
    softcap: float | None,
    kept: Tensor | None,
    target_head: Tensor | None,
    *,
    chunk_rows: int,
    steps: Steps,
    with_gradient: bool,
) -> tuple[VocabularyLosses, list[Tensor | None]]:
    """The losses, and the gradients of `loss` for hidden, latents and markov_w2."""
    rows, dtype = hidden.shape[0], _product_dtype(head)
    exact = dtype == torch.float32
    factors = [(hidden, head)]
    if latents is not None and markov_w2 is not None:
        factors.append((latents, markov_w2.to(dtype)))
    step = max(1, math.ceil(rows / max(1, math.ceil(rows / chunk_rows))))  # chunks of about the same size
    vocab = head.shape[0]
    width = vocab if kept is None else (vocab // ALIGNMENT + 1) * ALIGNMENT  # with the token of all others

    all_logits = hidden.new_empty(step, width, dtype=torch.float32)
    # For the target's logits, before them for a bias that its matrix product cannot add to the draft's, and after them
    # for the draft's logits before the cap.
    needs_second = target_hidden is not None or (len(factors) == 2 and not exact) or softcap is not None
    all_second = torch.empty_like(all_logits) if needs_second else all_logits
    everything = None
    if kept is not None and target_hidden is not None:
        assert target_head is not None, "of the target's whole vocabulary"
        everything = hidden.new_empty(step, len(target_head), dtype=torch.float32)
    all_slopes = torch.empty_like(all_logits, dtype=dtype) if with_gradient and not exact else all_logits
    ce, l1 = hidden.new_zeros(2, rows, dtype=torch.float32)
    input_gradients = [torch.empty_like(inputs) for inputs, _ in factors]
    w2_gradient = w2_summand = None
    if with_gradient and markov_w2 is not None:
        w2_gradient = torch.zeros_like(markov_w2, dtype=torch.float32)
        w2_summand = w2_gradient if exact else torch.empty_like(w2_gradient)

    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        logits, second, slopes = (buffer[: chunk.stop - start] for buffer in (all_logits, all_second, all_slopes))
        inputs_of_chunk = [_scaled(inputs[chunk], logit_scale).to(dtype) for inputs, _ in factors]
        _head_logits(inputs_of_chunk[0], head, logits)
        if softcap is not None:
            steps.soft_cap(logits, softcap)
        for latents_of_chunk, (_, table) in zip(inputs_of_chunk[1:], factors[1:], strict=True):
            for columns, part in _parts(table, dtype):
                _multiply(latents_of_chunk, part.T, logits[:, columns], second[:, columns])
        if kept is not None:
            logits[:, vocab:] = -torch.inf
        if target_hidden is not None:
            whole = second if everything is None else everything[: len(second)]
            states = _scaled(target_hidden[chunk], logit_scale).to(dtype)
            _head_logits(states, head if target_head is None else target_head, whole)
            if softcap is not None:
                steps.soft_cap(whole, softcap)
            if kept is not None:
                _split_off_others(whole, kept, second)
        steps.losses_of_rows(
            logits,
            None if target_hidden is None else second,
            None if targets is None else targets[chunk],
            weights[chunk].float(),
            ce_scale,
            tv_scale,
            ce[chunk],
            l1[chunk],
            slopes if with_gradient else None,
        )
        if w2_gradient is not None:
            _multiply(slopes[:, :vocab].T, inputs_of_chunk[-1], w2_gradient, w2_summand)
        if with_gradient:
            for index in reversed(range(len(factors))):  # the head's last: its slopes overwrite those of the bias
                if index == 0 and softcap is not None:
                    _head_logits(inputs_of_chunk[0], head, second)
                    steps.multiply_by_slope(slopes, second, softcap)
                gradient = sum(slopes[:, columns] @ part for columns, part in _parts(factors[index][1], dtype))
                input_gradients[index][chunk] = _scaled(cast(Tensor, gradient), logit_scale)
    loss = (weights * (ce_scale * ce + tv_scale * l1)).sum()
    losses = VocabularyLosses(loss, ce, None if target_hidden is None else l1)
    if w2_gradient is None or markov_w2 is None:
        return losses, [input_gradients[0], None, None]
    return losses, [*input_gradients, w2_gradient.to(markov_w2.dtype)]


def _split_off_others(logits: Tensor, kept: Tensor, out: Tensor) -> None:
    """Logits of the kept tokens and behind them one for all others together: of the sum of their exponentials.

    Args:
        logits: [rows, vocab of the target], overwritten.
        out: [rows, more than kept], what is left over becomes -inf.
    """
    count = len(kept)
    out[:, :count] = logits[:, kept]
    logits.index_fill_(1, kept, -torch.inf)
    largest = logits.amax(-1, keepdim=True)
    out[:, count:] = -torch.inf
    out[:, count] = logits.sub_(largest).exp_().sum(-1).log_() + largest[:, 0]


def _fused_steps() -> Steps:
    from deepspec.kernels import losses_triton  # imports Triton, which not everybody has

    return Steps(losses_triton.losses_of_rows, losses_triton.soft_cap_, losses_triton.multiply_by_slope)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap)"""
    return cap * torch.tanh(logits / cap)


def _soft_cap_(logits: Tensor, cap: float) -> Tensor:
    """`soft_cap` in place."""
    return logits.div_(cap).tanh_().mul_(cap)


def multiply_by_slope(gradient: Tensor, logits: Tensor, cap: float) -> None:
    """Make the gradient for capped logits that for logits: times 1 - tanh(logits / cap)^2.

    Args:
        gradient: [rows, vocab], changed.
        logits: float32 [rows, vocab], before the cap; overwritten.
    """
    gradient.mul_(logits.div_(cap).tanh_().square_().neg_().add_(1))


def _scaled(values: Tensor, factor: float) -> Tensor:
    return values if factor == 1 else values * factor


def _head_logits(states: Tensor, head: Tensor, out: Tensor) -> None:
    """states @ head^T into `out`."""
    for columns, part in _parts(head, states.dtype):
        _multiply(states, part.T, out[:, columns])


def _product_dtype(head: Tensor) -> torch.dtype:
    """Of the operands: low precision where its products can be float32 and are faster."""
    return head.dtype if head.is_cuda and head.dtype in (torch.bfloat16, torch.float16) else torch.float32


def _parts(table: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Which rows, and the rows in `dtype`: all at once if they have it already, else so few that they are cheap."""
    step = table.shape[0] if table.dtype == dtype else max(1, CONVERTED_ELEMENTS // table.shape[1])
    for start in range(0, table.shape[0], step):
        rows = slice(start, min(start + step, table.shape[0]))
        yield rows, table[rows].to(dtype)


def _multiply(left: Tensor, right: Tensor, out: Tensor, summand: Tensor | None = None) -> None:
    """left @ right into `out`, or added to it if there is a `summand`, a tensor like `out` that may be overwritten.

    `out` is float32; the others may be in low precision on CUDA.
    """
    if left.dtype == out.dtype:
        out.addmm_(left, right, beta=0 if summand is None else 1)
    elif summand is None:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=summand)
        out.add_(summand)


def _cached_rows(logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """So many rows at a time that what is done with them finds them in a cache, and two buffers of their shape."""
    rows, vocab = logits.shape
    cores = torch.get_num_threads() if logits.device.type == "cpu" else 1
    cached = CACHED_ELEMENTS.get(logits.device.type, CACHED_ELEMENTS["cuda"])
    step = min(rows, cores * max(1, cached // vocab))
    first, second = logits.new_empty(2, step, vocab)
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        yield some, first[: some.stop - start], second[: some.stop - start]


def losses_of_rows(
    logits: Tensor,
    target_logits: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
    ce: Tensor,
    l1: Tensor,
    gradient: Tensor | None,
) -> None:
    """Cross-entropy, distance and the gradient for the logits of some rows.

    d ce / dz = p - onehot; d l1 / dz = p * (s - <s, p>) with s = sign(p - p_t).

    Args:
        logits, target_logits: float32 [rows, vocab], overwritten. Without target logits the tv_scale is 0.
        targets: [rows], -1 = without a cross-entropy.
        weights: [rows]
        ce, l1: [rows], filled; l1 only with target logits.
        gradient: [rows, vocab], filled with that of weights * (ce_scale * ce + tv_scale * l1); may be `logits` itself.
    """
    for some, p, q in _cached_rows(logits):
        z, target, weight = logits[some], targets[some, None], weights[some, None]
        ce_weight = ce_scale * weight * (target >= 0)
        target = target.clamp(min=0)
        largest, of_target = z.amax(-1), z.gather(1, target).squeeze(1)
        torch.softmax(z, -1, out=p)
        # The largest probability is 1 / sum(exp(z - largest)).
        ce[some] = (largest - of_target - p.amax(-1).log_()).masked_fill_(targets[some] < 0, 0.0)
        if target_logits is not None:
            torch.softmax(target_logits[some], -1, out=q)
            difference = torch.sub(p, q, out=q)
            l1[some] = torch.abs(difference, out=z).sum(-1)
        if gradient is None:
            continue
        if tv_scale:
            signed_p = difference.sign_().mul_(p)
            of_p = ce_weight - tv_scale * weight * signed_p.sum(-1, keepdim=True)
            torch.mul(p, of_p, out=z).addcmul_(signed_p, weight, value=tv_scale)
        else:
            torch.mul(p, ce_weight, out=z)
        z.scatter_add_(1, target, -ce_weight)
        if gradient is not logits:
            gradient[some] = z


def soft_losses_of_rows(
    logits: Tensor,
    target_logits: Tensor,
    targets: None,
    weights: Tensor,
    ce_scale: float,
    tv_scale: float,
    ce: Tensor,
    l1: Tensor,
    gradient: Tensor | None,
    *,
    known: int,
) -> None:
    """`losses_of_rows` with the cross-entropy of the target's distribution q; both logits are overwritten.

    -<q, log p> = m * log sum exp(z) - <q, z>; d ce / dz = m * p - q, where m is the mass of q over the tokens that the
    draft knows, and so are the sums.

    Args:
        known: columns before that of all other tokens, if there is one.
    """
    for some, p, q in _cached_rows(logits):
        z, weight = logits[some], weights[some, None]
        torch.softmax(target_logits[some], -1, out=q)
        mass = q[:, :known].sum(-1, keepdim=True)
        expected = torch.mul(q[:, :known], z[:, :known], out=target_logits[some][:, :known]).sum(-1)
        ce[some] = mass[:, 0] * z.logsumexp(-1) - expected
        torch.softmax(z, -1, out=p)
        difference = torch.sub(p, q, out=q)
        l1[some] = torch.abs(difference, out=z).sum(-1)
        if gradient is None:
            continue
        torch.addcmul(difference, p, mass - 1, out=z).mul_(ce_scale * weight)
        if tv_scale:
            signed_p = difference.sign_().mul_(p)
            z.addcmul_(p, weight * signed_p.sum(-1, keepdim=True), value=-tv_scale)
            z.addcmul_(signed_p, weight, value=tv_scale)
        if gradient is not logits:
            gradient[some] = z


PLAIN_STEPS = Steps(losses_of_rows, _soft_cap_, multiply_by_slope)
