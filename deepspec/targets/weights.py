"""A target's weight files, matched to the parameters of its model without loading it.

Names in the files differ from those in the model where Transformers renames or merges weights while it loads them; its
own conversion rules are asked. Tensors are memory-mapped: only what is looked at is read.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from deepspec.config import ConfigError
from deepspec.files import INDEX_FILE, SINGLE_FILE, download_model, weight_files
from deepspec.targets.adapters import TargetAdapter, adapter_for
from deepspec.targets.fingerprint import fingerprint_of
from deepspec.targets.source import first_line, model_class, read_config, resolve_path

TORCH_FILE = "pytorch_model.bin"
GGUF_EMBEDDING, GGUF_HEAD = "token_embd.weight", "output.weight"  # the same for every architecture


class TargetWeights:
    """The weights of a target as a folder of safetensors or PyTorch files stores them."""

    def __init__(self, folder: Path, config: PreTrainedConfig, adapter: type[TargetAdapter], model: PreTrainedModel):
        """
        Args:
            model: of this config, on the meta device.

        Raises:
            FileNotFoundError, ConfigError: see `open_weights`.
        """
        self.model = model
        self._quantisation = getattr(config, "quantization_config", None)
        self._adapter = adapter
        self._stored = _match(folder, model, read_files(folder), is_quantised=self._quantisation is not None)

    @property
    def fingerprint(self) -> str:
        """See `Target.fingerprint`. How the weights are quantised is part of it: that changes what they compute."""
        quantisation = json.dumps(self._quantisation, sort_keys=True, default=str) if self._quantisation else ""
        return fingerprint_of(self._stored.items(), quantisation)

    @property
    def num_parameters(self) -> int:
        """Of the whole model, by its config."""
        return sum(weight.numel() for weight in self.model.parameters())

    def embedding_and_head(self) -> tuple[Tensor, Tensor]:
        """Both [vocab, hidden]; the same tensor where the target ties them.

        Raises:
            ConfigError: one is stored quantised.
        """
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        embedding, head = self._adapter.embedding(self.model).weight, self._adapter.head(self.model).weight
        tensors = [self._plain(names[parameter], parameter.shape) for parameter in (embedding, head)]
        return tensors[0], tensors[0] if head is embedding else tensors[1]

    def _plain(self, name: str, shape: torch.Size) -> Tensor:
        tensor = self._stored.get(name)
        if tensor is None or not tensor.is_floating_point() or tensor.itemsize == 1 or tensor.shape != shape:
            raise ConfigError(
                f"{name} of the target is stored quantised, which only Transformers can read: load the whole target "
                "with features.source=online"
            )
        return tensor


class GgufWeights(TargetWeights):
    """The weights of a target in a GGUF file."""

    def __init__(self, file: Path, model: PreTrainedModel):
        self.model = model
        self._tensors = _read_gguf(file)
        if GGUF_EMBEDDING not in self._tensors:
            raise ConfigError(f"{file}: has no tensor {GGUF_EMBEDDING}; a language model has one")

    @property
    def fingerprint(self) -> str:
        """Of the quantised blocks as they lie in the file."""
        return fingerprint_of((name, torch.from_numpy(tensor.data)) for name, tensor in self._tensors.items())

    def embedding_and_head(self) -> tuple[Tensor, Tensor]:
        """Dequantised, float32."""
        embedding = _dequantise(self._tensors[GGUF_EMBEDDING])
        return embedding, _dequantise(self._tensors[GGUF_HEAD]) if GGUF_HEAD in self._tensors else embedding


def open_weights(path: str, revision: str | None = None, gguf_file: str | None = None) -> TargetWeights:
    """Open the weight files of a target: `builtin`, a folder, or a Hub id.

    Raises:
        FileNotFoundError: no such model, or a weight file is missing.
        ConfigError: a damaged file, or files that do not hold the weights that the config asks for.
    """
    config = read_config(path, revision, gguf_file)
    adapter = adapter_for(config)
    with torch.device("meta"):
        model = model_class(config, path).from_config(config)
    folder = Path(resolve_path(path, gguf_file))
    if not folder.is_dir():
        folder = download_target(path, revision, gguf_file)
    return GgufWeights(folder / gguf_file, model) if gguf_file else TargetWeights(folder, config, adapter, model)


def download_target(repo: str, revision: str | None, gguf_file: str | None) -> Path:
    """The folder of a Hub repository's weights in the local cache.

    Raises:
        FileNotFoundError: it cannot be fetched.
    """
    if gguf_file is not None:
        return download_model(repo, revision, "target.path", [gguf_file])
    folder = download_model(repo, revision, "target.path")
    if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        folder = download_model(repo, revision, "target.path", ["*.json", "pytorch_model*.bin"])
    return folder


def read_files(folder: Path) -> dict[str, Tensor]:
    """Memory-mapped tensors by their names in the safetensors files of a folder, or in its PyTorch files.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        ConfigError: a damaged file, or one that holds more than tensors.
    """
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        names, read = weight_files(folder), _read_safetensors
    elif any((folder / name).is_file() for name in (TORCH_FILE, f"{TORCH_FILE}.index.json")):
        names, read = weight_files(folder, TORCH_FILE), _read_torch
    else:
        raise FileNotFoundError(
            f"{folder}: no weights; {SINGLE_FILE} or {TORCH_FILE} is expected there, or several files with an index, "
            "as save_pretrained writes them (target.gguf_file names a GGUF file)"
        )
    tensors: dict[str, Tensor] = {}
    for file in names:
        tensors |= read(file)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: damaged or incomplete ({error}); copy or download it again") from error


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        # files of PyTorch before 1.6 are no archives and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (RuntimeError, KeyError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"{file}: damaged, incomplete or not of tensors alone ({first_line(error)}); copy or download it again, or "
            "load the target with Transformers and save it as safetensors with save_pretrained"
        ) from error
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


@lru_cache(maxsize=1)
def _read_gguf(file: Path) -> dict[str, Any]:
    """Tensors of the gguf package by name, memory-mapped. Kept, because reading what stands before them takes seconds.

    Raises:
        ConfigError: a damaged file.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file, "c")  # private copy of what is written, which is nothing; torch asks for writable
    except Exception as error:  # whatever reading binary structures runs into
        raise ConfigError(f"{file}: damaged or no GGUF file ({first_line(error)}); download it again") from error
    return {tensor.name: tensor for tensor in reader.tensors}


def _dequantise(tensor: Any) -> Tensor:
    from gguf import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))


def _match(
    folder: Path, model: PreTrainedModel, files: Mapping[str, Tensor], *, is_quantised: bool
) -> dict[str, Tensor]:
    """The stored tensors that the model loads, named as the model names them; parts of a parameter that Transformers
    merges while loading keep their names in the files.

    Raises:
        ConfigError: a parameter is missing or has another shape. Quantised files store other tensors instead of some
            parameters; of those, nothing is checked, and what is stored is kept as it is.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.items():
        new_name, merged_by = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if merged_by is not None and new_name in state:
            parts.setdefault(new_name, {})[name] = tensor
        else:
            renamed[name if name in state else new_name] = tensor
    return _take(folder, model, renamed, parts, is_quantised)


def _take(
    folder: Path,
    model: PreTrainedModel,
    renamed: dict[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
    is_quantised: bool,
) -> dict[str, Tensor]:
    aliases: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(parameter, []).append(name)
    taken: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found = next((alias for alias in aliases[parameter] if alias in renamed), None)
        if found is not None and (renamed[found].shape == parameter.shape or is_quantised):
            taken[name] = renamed[found]
        elif name in parts:
            taken |= parts[name]
        elif not is_quantised:
            what = "has no weight" if found is None else f"has the shape {list(renamed[found].shape)} for"
            raise ConfigError(
                f"{folder}: {what} {name} {list(parameter.shape)}, which its config.json asks for; copy or download "
                "the folder again, or load the model it came from with Transformers and save it with save_pretrained"
            )
    return renamed | taken if is_quantised else taken
