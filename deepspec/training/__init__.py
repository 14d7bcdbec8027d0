"""Training: anchors, objective, loop, exact resume, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspec.training.loop import TrainResult, train

__all__ = ["TrainResult", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use: reading an objective or a metric needs no accelerate."""
    if name in __all__:
        from deepspec.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'deepspec.training' has no attribute {name!r}")
