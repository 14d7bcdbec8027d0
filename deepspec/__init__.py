"""DeepSpec: train draft models for speculative decoding, measure them, publish them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspec.drafts.loading import load_draft

__all__ = ["__version__", "load_draft"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import deepspec` stays quick."""
    if name == "load_draft":
        from deepspec.drafts.loading import load_draft

        return load_draft
    raise AttributeError(f"module 'deepspec' has no attribute {name!r}")
