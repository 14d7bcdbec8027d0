"""The norm of Llama, Qwen and their kin, which Transformers computes in eight kernels, in one."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from deepspec.kernels.dispatch import runs_in_triton


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, implementation: str | None = None) -> Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon), in float32 up to the product with the weight, as Transformers rounds it.

    Args:
        hidden: [..., size], contiguous.
        weight: [size]
        implementation: "plain" or "triton"; None = triton on a GPU where it is installed.

    Returns:
        [..., size] in the dtype that `weight * hidden` has.
    """
    if runs_in_triton(hidden, implementation):
        from deepspec.kernels import rms_norm_triton  # imports Triton, which not everybody has

        return rms_norm_triton.rms_norm(hidden, weight, epsilon)
    x = hidden.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)).to(hidden.dtype)


def fuse_norms(model: nn.Module) -> None:
    """Let the norms in a model be `rms_norm` wherever no gradient is wanted.

    Which modules are such norms is found by what they compute; others, such as Gemma's, which add 1 to their weight,
    stay as they are.
    """
    for module in model.modules():
        if _is_rms_norm(module):
            module.forward = MethodType(_forward, module)


def _forward(norm: Any, hidden: Tensor) -> Tensor:
    if torch.is_grad_enabled() or not hidden.is_contiguous():
        return type(norm).forward(norm, hidden)
    return rms_norm(hidden, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return False
    if "forward" in vars(module):  # somebody else has wrapped it
        return False
    sample = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
    return torch.equal(module(sample), rms_norm(sample, weight, epsilon, "plain"))
