"""Losses and gradients of one implementation, for tests; also run in a process of its own, under Triton's interpreter.

losses_driver.py CASES RESULTS: reads {name: (inputs, chunk_rows)}, writes {name: tensors} of the Triton implementation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deepspec.kernels.losses import vocabulary_losses

UPSTREAM = 0.7
TRAINED = ("hidden", "latents", "markov_w2")


def outputs(inputs: dict[str, Any], implementation: str | None, chunk_rows: int | None = None) -> dict[str, Tensor]:
    """`loss`, `ce`, `l1` and the gradients of UPSTREAM * loss, those that exist."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in TRAINED if inputs[name] is not None}
    losses = vocabulary_losses(**(inputs | leaves), chunk_rows=chunk_rows, implementation=implementation)
    (UPSTREAM * losses.loss).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    found = losses._asdict() | gradients
    return {name: value.detach() for name, value in found.items() if value is not None}


def outputs_of_rows(losses_of_rows: Callable[..., None], dtype: torch.dtype) -> dict[str, Tensor]:
    """`ce`, `l1` and the gradient for random logits, which goes to a tensor of its own."""
    generator = torch.Generator().manual_seed(0)
    logits, target_logits = 3 * torch.randn(2, 4, 1001, generator=generator)
    ce, l1, weights = torch.zeros(4), torch.zeros(4), torch.rand(4, generator=generator)
    gradient = torch.zeros(4, 1001, dtype=dtype)
    losses_of_rows(logits, target_logits, torch.arange(4), weights, 0.1, 0.9, ce, l1, gradient)
    return {"ce": ce, "l1": l1, "gradient": gradient}


if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    results = {name: outputs(inputs, "triton", rows) for name, (inputs, rows) in cases.items()}
    from deepspec.kernels import losses_triton

    results["rows in bf16"] = outputs_of_rows(losses_triton.losses_of_rows, torch.bfloat16)
    torch.save(results, sys.argv[2])
