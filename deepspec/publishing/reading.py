"""Open a folder that somebody calls a draft: its config and the headers of its weights, or a line that says why not."""

from __future__ import annotations

import json
from pathlib import Path

from deepspec.files import INDEX_FILE, SINGLE_FILE
from deepspec.publishing.errors import PublishError
from deepspec.publishing.formats import DraftFolder
from deepspec.publishing.weights import read_tensors

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def read_folder(path: Path) -> DraftFolder:
    """Config and tensors of a draft folder of any format. Reads headers, no weights.

    Raises:
        FileNotFoundError: no such folder.
        PublishError: it holds no readable checkpoint; the message says what is there instead.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give the folder of a draft on this machine")
    if not (path / "config.json").is_file():
        raise PublishError(f"{path}: {_without_config(path)}")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise PublishError(f"{path / 'config.json'}: not a readable config: {error}") from error
    if not (path / SINGLE_FILE).is_file() and not (path / INDEX_FILE).is_file():
        raise PublishError(f"{path}: {_without_weights(path)}")
    return DraftFolder(path, config, read_tensors(path))


def pickled_files(path: Path) -> list[str]:
    """Names of files that may run code when they are loaded."""
    return sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)


def _without_config(path: Path) -> str:
    snapshots = sorted(path.glob("snapshots/*/config.json"))
    if snapshots:
        return f"a folder of the Hub's cache; the model is in {snapshots[-1].parent}"
    if not any(path.iterdir()):
        return "empty"
    if list(path.glob("*.gguf")):
        return "GGUF files and no config.json; a draft is a folder with config.json and safetensors"
    return "no config.json; give the folder of a draft"


def _without_weights(path: Path) -> str:
    if pickled := pickled_files(path):
        return (
            f"weights in {', '.join(pickled)}, which may run code when loaded; load them where you trust them and save "
            "them as safetensors (save_pretrained)"
        )
    others = sorted(file.name for file in path.glob("*.safetensors"))
    if others:
        return f"neither {SINGLE_FILE} nor {INDEX_FILE}, only {', '.join(others[:5])}; rename it, or copy the index too"
    return f"no weights ({SINGLE_FILE} or {INDEX_FILE}); copy or download them again"
