"""How long a text a target can read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig


def position_range(text_config: PreTrainedConfig) -> int:
    """Positions that a target was made to read: prompt and answer together.

    `max_position_embeddings`, or what YaRN extends it to: the model cards of Qwen and others switch YaRN on by its
    rope parameters alone and leave that number as it was. Of the other rope types, llama3 and longrope come with
    configs that write the extended number; linear ones write the extended (DeepSeek-Coder, Gemma 3) or the original
    one (LongChat), which the config does not tell, so they count as written; dynamic ones rotate early positions
    differently once the text is longer, which neither packed rows nor a cache can follow.

    Args:
        text_config: of the target; its rope parameters are one dict, or one for each type of layer. Layers of the
            widest range decide: those with a window do not look further back than that.

    Returns:
        `sys.maxsize` where the config writes no limit.
    """
    written = getattr(text_config, "max_position_embeddings", None)
    if written is None:
        return sys.maxsize
    return max([written, *_extended(text_config, written)])


def _extended(text_config: PreTrainedConfig, written: int) -> Iterator[int]:
    """What YaRN makes of the original range, for each type of layer that has it."""
    parameters: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if rope.get("rope_type") == "yarn" and rope.get("factor"):
            yield int(rope.get("original_max_position_embeddings", written) * rope["factor"])
