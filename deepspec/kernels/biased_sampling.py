"""One step of a sequential head while decoding: the bias of the tokens before, and the draw (DSpark section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.kernels.dispatch import runs_in_triton
from deepspec.kernels.inversion import distribution_of, sample


def draw_biased(
    base: Tensor,
    latents: Tensor,
    markov_w2: Tensor,
    temperatures: Tensor,
    uniform: Tensor,
    out: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token of every row from softmax((base + latents @ W2^T) / temperature).

    The logits and the distribution are float32, and so are the products and their sum (of float32 inputs Triton makes
    each product of three in TF32). The Triton implementation reads W2 once for all rows. A row that is not finite gets
    some token of the vocabulary.

    Args:
        base: [rows, vocab], logits of the backbone, the last stride 1.
        latents: [rows, rank], e_k of the head, the last stride 1.
        markov_w2: [vocab, rank], without gaps.
        temperatures: float32 [rows], without gaps; 0 = the largest logit, the first of equals.
        uniform: float64 [rows], from 0 to below 1; read for every row, used by those of a temperature above 0.
        out: float32 [rows, vocab], the last stride 1; where the distribution goes. None = a new tensor.
        implementation: "plain" or "triton"; None = triton on a GPU where it is installed.

    Returns:
        Token ids, long [rows], and `out`, the distribution that they were exactly drawn from: the first token whose
        cumulative probability, summed in float64, is above uniform * total. One-hot at temperature 0.
    """
    _check(base, latents, markov_w2)
    assert temperatures.shape == uniform.shape == base.shape[:1]
    assert uniform.dtype == torch.float64
    assert temperatures.is_contiguous()
    if out is None:
        out = torch.empty_like(base, dtype=torch.float32, memory_format=torch.contiguous_format)
    assert (out.shape, out.dtype, out.stride(-1)) == (base.shape, torch.float32, 1)
    if runs_in_triton(base, implementation):
        from deepspec.kernels import biased_sampling_triton  # imports Triton, which not everybody has

        return biased_sampling_triton.draw_biased(base, latents, markov_w2, temperatures, uniform, out), out
    out.copy_(distribution_of(_logits(base, latents, markov_w2), temperatures))
    return sample(out, uniform), out


def argmax_biased(base: Tensor, latents: Tensor, markov_w2: Tensor, implementation: str | None = None) -> Tensor:
    """What `draw_biased` draws when every temperature is 0, long [rows], without writing any distribution."""
    _check(base, latents, markov_w2)
    if runs_in_triton(base, implementation):
        from deepspec.kernels import biased_sampling_triton

        return biased_sampling_triton.argmax_biased(base, latents, markov_w2)
    return _logits(base, latents, markov_w2).argmax(-1)


def _logits(base: Tensor, latents: Tensor, markov_w2: Tensor) -> Tensor:
    """float32 [rows, vocab]"""
    return torch.addmm(base.float(), latents.float(), markov_w2.float().T)


def _check(base: Tensor, latents: Tensor, markov_w2: Tensor) -> None:
    assert base.shape == (len(latents), len(markov_w2))
    assert latents.shape[1] == markov_w2.shape[1]
    assert base.stride(-1) == latents.stride(-1) == 1
    assert markov_w2.is_contiguous()
