"""How long a text a target can read."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedConfig

from deepspec.config import ConfigError

LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types


def position_range(text_config: PreTrainedConfig) -> int:
    """Positions that a target was made to read: prompt and answer together.

    `max_position_embeddings`, or what YaRN extends it to: the model cards of Qwen and others switch YaRN on by its
    rope parameters alone and leave that number as it was. Llama3 ropes come with configs that write the extended
    number; linear ones write the extended (DeepSeek-Coder, Gemma 3) or the original one (LongChat), which the config
    does not tell, so they count as written.

    Of ropes that depend on the length of the row, the range within which they do not: beyond it they turn the early
    positions otherwise than before, which neither packed rows nor a cache can follow (vLLM takes one of longrope's two
    factors for all rows).

    Args:
        text_config: of the target; its rope parameters are one dict, or one for each type of layer. Layers of the
            widest range decide: those with a window do not look further back than that.

    Returns:
        `sys.maxsize` where the config writes no limit.
    """
    written = getattr(text_config, "max_position_embeddings", None)
    if written is None:
        return sys.maxsize
    original = getattr(text_config, "original_max_position_embeddings", None)
    extended = []
    for rope in _ropes(text_config):
        its_original = rope.get("original_max_position_embeddings") or original or written
        if rope.get("rope_type") == "longrope":
            return its_original
        if rope.get("rope_type") == "yarn" and rope.get("factor"):
            extended.append(int(its_original * rope["factor"]))
    return max([written, *extended])


def check_positions(text_config: PreTrainedConfig, wanted: int, key: str) -> None:
    """Refuse rows that a rope which depends on their length would turn otherwise than shorter ones.

    Args:
        wanted: positions.
        key: of the configuration that asks for them.

    Raises:
        ConfigError: they are beyond what the rope turns alike.
    """
    kind = next((r["rope_type"] for r in _ropes(text_config) if r.get("rope_type") in LENGTH_DEPENDENT), None)
    if kind is not None and wanted > position_range(text_config):
        raise ConfigError(
            f"{key}={wanted}: the target's rope of type {kind} changes with the length of a row beyond "
            f"{position_range(text_config)} positions, which packed rows and caches cannot follow; set at most "
            f"{key}={position_range(text_config)}"
        )


def _ropes(text_config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Rope parameters, of each type of layer that has its own."""
    parameters: dict[str, Any] = getattr(text_config, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
