"""What is not finite, where a loss or a gradient is not: looked for only then, so that no step pays for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from deepspec.data.packing import Document
    from deepspec.targets import TargetFeatures

FINAL = "the final state"


class NotFiniteError(RuntimeError):
    """A loss, a gradient or features that are not finite. The message names them and says what to do."""


def not_finite(
    features: TargetFeatures, documents: Sequence[Document], layer_ids: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """The samples of a batch with features that are not finite: place in the dataset, and which of the features.

    Args:
        layer_ids: whose outputs `features.context` holds, -1 = the embedding output.
    """
    parts = dict(zip(layer_ids, features.context.chunk(len(layer_ids), dim=-1), strict=True))
    for document in documents:
        for layer_id, values in parts.items():
            if not _all_finite(values, document):
                yield document.index, "the embedding output" if layer_id == -1 else f"layer {layer_id}"
        if not _all_finite(features.final, document):
            yield document.index, FINAL


def _all_finite(values: Tensor, document: Document) -> bool:
    return bool(values[document.row, document.columns].isfinite().all())


def overflow_advice(dtype: str, source: str) -> str:
    """What to do about features that are not finite.

    Args:
        dtype: of the target.
        source: where features come from, see `features.source`.
    """
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float32", "float32": None}.get(dtype, "float32")
    if wider is None:
        return f"target.dtype={dtype} does not overflow by itself: look at the target's weights, are they damaged?"
    again = " and write the cache again" if source == "cached" else ""
    return f"target.dtype={dtype} is too narrow for this target: set target.dtype={wider}{again}, in a new output_dir"
