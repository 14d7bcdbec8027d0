"""Find and load a target: `builtin`, a folder, or a Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from deepspec.targets.adapters import adapter_for
from deepspec.targets.target import Target

BUILTIN_WEIGHTS = Path(__file__).with_name("builtin_weights")


def resolve_path(path: str) -> str:
    """`builtin` -> the folder of the built-in target's weights; anything else is returned as it is.

    Raises:
        FileNotFoundError: it looks like a folder (or is the built-in target) and holds no config.json.
    """
    resolved = str(BUILTIN_WEIGHTS) if path == "builtin" else path
    looks_local = path == "builtin" or Path(path).exists() or path.startswith(("/", "./", "../", "~"))
    if looks_local and not (Path(resolved).expanduser() / "config.json").is_file():
        raise FileNotFoundError(
            f"target.path={path}: no config.json in {resolved}; give a folder with a saved Hugging Face model, "
            "a Hub id, or 'builtin'"
        )
    return str(Path(resolved).expanduser()) if looks_local else resolved


def load_target_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """The target's (text) config, without its weights. Raises ValueError for an unsupported family."""
    config = AutoConfig.from_pretrained(resolve_path(path), revision=revision)
    return adapter_for(config).text_config(config)


def load_target(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Target:
    """Load and freeze a target: `builtin`, a folder, or a Hub id.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: no adapter for this model family.
    """
    resolved = resolve_path(path)
    model: Any = AutoModelForCausalLM.from_pretrained(resolved, revision=revision, dtype=dtype)
    return Target(model.to(device), name_or_path=path, revision=revision)


def load_tokenizer(
    path: str, *, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """The target's tokenizer; `chat_template` names a Jinja file that replaces its own template.

    Raises:
        FileNotFoundError: the template file does not exist.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(path), revision=revision)
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise FileNotFoundError(f"data.chat_template={chat_template}: no such file")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer
