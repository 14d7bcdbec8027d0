"""A frozen target language model and the features that a draft reads from it (DSpark section 3; DFlash section 3)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from deepspec.data.packing import TokenBatch
from deepspec.targets.adapters import adapter_for
from deepspec.targets.attention import DOCUMENTS, attend_with
from deepspec.targets.capture import capture_layers
from deepspec.targets.fingerprint import fingerprint_of


@dataclass(frozen=True)
class TargetFeatures:
    """What one forward pass of the target gives a draft."""

    context: Tensor  # [batch, tokens, captured layers * hidden], layers concatenated in the order asked for
    final: Tensor  # [batch, tokens, hidden], after the final norm: what the head reads


class Target:
    """A causal language model that is never trained: evaluation mode, no gradients."""

    def __init__(
        self, model: PreTrainedModel, name_or_path: str, revision: str | None = None, fingerprint: str | None = None
    ):
        self.adapter = adapter_for(model.config, name_or_path)
        self.model = model.eval().requires_grad_(False)
        self.config = self.adapter.text_config(model.config)
        self.name_or_path = name_or_path
        self.revision = revision
        self._decoder = self.adapter.decoder(model)
        self._layers = self.adapter.layers(model)
        self._head = self.adapter.head(model)
        parameters = inspect.signature(self._decoder.forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._fingerprint = fingerprint  # of the files; None = that of the weights in memory

    @property
    def vocab_size(self) -> int:
        return self.head_weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def embedding_weight(self) -> Tensor:
        """[vocab, hidden]"""
        return self.adapter.embedding(self.model).weight

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]"""
        return self._head.weight

    @property
    def decoder_layers(self) -> nn.ModuleList:
        return self._layers

    @property
    def final_norm(self) -> nn.Module:
        return self.adapter.final_norm(self.model)

    @property
    def fingerprint(self) -> str:
        """Identifies these weights: a draft records it and refuses any other target.

        SHA-256 over every weight's name, shape and evenly spaced values. The values are rounded to bfloat16 first, so
        the fingerprint is the same in whichever dtype the weights were loaded. A target that was loaded from files has
        the fingerprint of its files (`deepspec.targets.weights`), which is the same without loading the layers: names
        are the model's own, but weights that loading merges, splits or dequantises count as they are stored.
        """
        if self._fingerprint is None:
            self._fingerprint = fingerprint_of(self.model.named_parameters())
        return self._fingerprint

    @torch.no_grad()
    def features(self, batch: TokenBatch, layer_ids: Sequence[int]) -> TargetFeatures:
        """Features of whole documents, for training; those of padding mean nothing.

        Args:
            batch: padded or packed, on the target's device.
            layer_ids: captured layers, -1 = embedding output.
        """
        with attend_with(self.config, DOCUMENTS):
            return self.hidden_states(
                layer_ids,
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                documents=batch.documents if batch.is_packed else None,
            )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: Cache,
        layer_ids: Sequence[int] = (),
        **attention: Any,
    ) -> TargetFeatures:
        """One decoding step over new tokens; keys and values are written into `cache`.

        Args:
            input_ids: [batch, tokens]
            position_ids: [batch, tokens], absolute.
            attention_mask: bool [rows, 1, tokens of a row, keys], True = may attend.
            layer_ids: captured layers; with none, `context` is empty.
            attention: further arguments of the attention function.
        """
        return self.hidden_states(
            layer_ids,
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **attention,
            **{self.cache_argument: cache},
        )

    def logits(self, final: Tensor) -> Tensor:
        """Next-token logits in float32: [..., hidden] -> [..., vocab]."""
        return self._head(final).float()

    def hidden_states(self, layer_ids: Sequence[int], **inputs: Any) -> TargetFeatures:
        """Captured layers and final states of a forward pass of the decoder with these arguments."""
        with capture_layers(self._layers, layer_ids) as captured:
            final = self._decoder(**inputs).last_hidden_state
        if not layer_ids:
            return TargetFeatures(final.new_empty(*final.shape[:2], 0), final)
        return TargetFeatures(torch.cat([captured[i].to(final.device) for i in layer_ids], dim=-1), final)
