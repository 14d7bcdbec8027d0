"""A target's embedding, head and fingerprint read from its weight files, without the layers between them.

Training from stored or served features needs no more of the target than this.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from deepspec.files import download_model, weight_files
from deepspec.targets.adapters import adapter_for
from deepspec.targets.fingerprint import fingerprint_of
from deepspec.targets.loading import load_target, resolve_path
from deepspec.targets.target import Target


class TargetHead:
    """What a draft takes from its target. The files are memory-mapped; layers are loaded when they are asked for."""

    def __init__(
        self,
        embedding_weight: Tensor,
        head_weight: Tensor,
        fingerprint: str,
        name_or_path: str,
        revision: str | None = None,
    ):
        self.embedding_weight = embedding_weight  # [vocab, hidden]
        self.head_weight = head_weight  # [vocab, hidden], the embedding's own memory where the target ties them
        self.fingerprint = fingerprint  # that of the whole target, see `Target.fingerprint`
        self.name_or_path = name_or_path
        self.revision = revision

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """Loads the whole target on the CPU, once."""
        return self._whole.decoder_layers

    @property
    def final_norm(self) -> nn.Module:
        """Loads the whole target on the CPU, once."""
        return self._whole.final_norm

    @cached_property
    def _whole(self) -> Target:
        return load_target(self.name_or_path, revision=self.revision, dtype=self.embedding_weight.dtype)


def load_target_head(path: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> TargetHead:
    """Read embedding, head and fingerprint of a target: `builtin`, a folder, or a Hub id.

    Args:
        dtype: of the two weights; converted in memory where the files hold another.

    Raises:
        FileNotFoundError: no such model, or a weight file is missing.
        ValueError: no adapter for this model family, a damaged file, or files that do not hold the model's weights.
    """
    resolved = resolve_path(path)
    config = AutoConfig.from_pretrained(resolved, revision=revision)
    adapter = adapter_for(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder = Path(resolved)
    stored = _read_weights(folder if folder.is_dir() else download_model(resolved, revision, "target.path"), model)
    tensors = {parameter: stored[name] for name, parameter in model.named_parameters()}
    embedding = tensors[adapter.embedding(model).weight].to(dtype)
    is_tied = adapter.head(model).weight is adapter.embedding(model).weight
    head = embedding if is_tied else tensors[adapter.head(model).weight].to(dtype)
    return TargetHead(embedding, head, fingerprint_of(stored.items()), path, revision)


def _read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Memory-mapped tensors for the names of `model.named_parameters()`."""
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    stored: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: damaged or incomplete ({error}); copy or download it again") from error
    weights = {}
    for name, parameter in model.named_parameters():
        found = next((alias for alias in aliases[parameter] if alias in stored), None)
        if found is None or stored[found].shape != parameter.shape:
            what = "has no weight" if found is None else f"has the shape {list(stored[found].shape)} for"
            raise ValueError(
                f"{folder}: {what} {name} {list(parameter.shape)}, which its config.json asks for; load the target "
                "with Transformers and save it again with save_pretrained"
            )
        weights[name] = stored[found]
    return weights
