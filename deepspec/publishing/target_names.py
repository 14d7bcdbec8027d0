"""How a card and a command name the target of a draft."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from deepspec.publishing.convert import BUILTIN


def is_hub_id(name: str | None) -> bool:
    """Whether a recorded target name can be found on the Hub: not the built-in one, not a folder."""
    if not name or name == BUILTIN or name.count("/") != 1 or Path(name).expanduser().exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def target_title(name: str | None) -> str:
    """How the card names a target, without the folders of the machine that trained the draft."""
    if not name:
        return "a target that its config.json does not name"
    if name == BUILTIN:
        return "the built-in target of DeepSpec"
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{Path(name).name}` (a local model)"
