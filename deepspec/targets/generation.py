"""Where a target's answers end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from deepspec.targets.source import load_target_config, resolve_path


def stop_tokens(
    path: str, revision: str | None, tokenizer: PreTrainedTokenizerBase, gguf_file: str | None = None
) -> tuple[int, ...]:
    """End-of-turn tokens: the tokenizer's, and those that `generate` stops at with this target."""
    listed = _generation_config(path, revision, gguf_file).eos_token_id
    found = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    return tuple(sorted(token for token in found if token is not None))


def _generation_config(path: str, revision: str | None, gguf_file: str | None) -> GenerationConfig:
    """As Transformers finds it for a model: generation_config.json, else what config.json or its text part says; of a
    GGUF file, what its metadata say."""
    if gguf_file is not None:
        return GenerationConfig.from_model_config(load_target_config(path, revision, gguf_file))
    folder, revision = resolve_path(path), revision or "main"
    sources: tuple[dict[str, Any], ...] = ({}, {"config_file_name": "config.json", "_from_model_config": True})
    for source in sources:
        with suppress(OSError):  # no such file
            return GenerationConfig.from_pretrained(folder, revision=revision, **source)
    return GenerationConfig()
