"""A target's embedding, head and fingerprint read from its weight files, without the layers between them.

Training from stored or served features needs no more of the target than this.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from deepspec.targets.loading import GIBIBYTE, in_millions, load_target
from deepspec.targets.source import dtype_name, resolve_dtype, shown_name
from deepspec.targets.target import Target
from deepspec.targets.weights import open_weights


class TargetHead:
    """What a draft takes from its target. The files are memory-mapped; layers are loaded when they are asked for."""

    def __init__(
        self,
        embedding_weight: Tensor,
        head_weight: Tensor,
        fingerprint: str,
        path: str,
        revision: str | None = None,
        gguf_file: str | None = None,
        *,
        num_layers: int,
        num_parameters: int,
    ):
        self.embedding_weight = embedding_weight  # [vocab, hidden]
        self.head_weight = head_weight  # [vocab, hidden], the embedding's own memory where the target ties them
        self.fingerprint = fingerprint  # that of the whole target, see `Target.fingerprint`
        self.name_or_path = shown_name(path, gguf_file)
        self.revision = revision
        self.num_layers = num_layers
        self.num_parameters = num_parameters  # of the whole target
        self._path, self._gguf_file = path, gguf_file

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

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
        return load_target(self._path, revision=self.revision, gguf_file=self._gguf_file, dtype=self.dtype)


def load_target_head(
    path: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str = "auto",
) -> TargetHead:
    """Read embedding, head and fingerprint of a target: `builtin`, a folder, or a Hub id.

    Args:
        gguf_file: the GGUF file there that holds the model.
        dtype: of the two weights, converted in memory where the files hold another; "auto": see `resolve_dtype`.

    Raises:
        FileNotFoundError: no such model, or a weight file is missing.
        ConfigError: not a language model, a damaged file, or files that do not hold the model's weights.
    """
    if isinstance(dtype, str):
        dtype = resolve_dtype(dtype, path, revision=revision, gguf_file=gguf_file)
    weights = open_weights(path, revision, gguf_file)
    stored_embedding, stored_head = weights.embedding_and_head()
    embedding = stored_embedding.to(dtype)
    head = embedding if stored_head is stored_embedding else stored_head.to(dtype)
    return TargetHead(
        embedding,
        head,
        weights.fingerprint,
        path,
        revision,
        gguf_file,
        num_layers=weights.model.config.get_text_config().num_hidden_layers,
        num_parameters=weights.num_parameters,
    )


def describe_head(target: TargetHead) -> str:
    """What of a target is in memory while its features come from elsewhere, in a line."""
    weights = {weight.data_ptr(): weight for weight in (target.embedding_weight, target.head_weight)}
    size = sum(weight.nbytes for weight in weights.values())
    return (
        f"target {target.name_or_path}: embedding and head of {in_millions(target.num_parameters)} parameters, "
        f"{dtype_name(target.dtype)}, {size / GIBIBYTE:.2f} GiB; its features come from elsewhere"
    )
