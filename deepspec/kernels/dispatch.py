"""Which of an operation's equal implementations runs."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor

IMPLEMENTATIONS = ("plain", "triton")


def runs_in_triton(tensor: Tensor, implementation: str | None) -> bool:
    """Whether an operation on `tensor` runs in Triton; None = on a GPU where it is installed.

    Raises:
        ValueError: no such implementation.
    """
    if implementation is None:
        return tensor.is_cuda and _triton_is_installed()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation}: must be one of {', '.join(IMPLEMENTATIONS)}, or None")
    return implementation == "triton"


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
