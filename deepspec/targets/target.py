"""A frozen target language model and the features that a draft reads from it (DSpark section 3; DFlash section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from deepspec.data.packing import TokenBatch, one_document_a_row
from deepspec.kernels.rms_norm import fuse_norms
from deepspec.targets.adapters import adapter_for
from deepspec.targets.attention import DOCUMENTS, attend_with
from deepspec.targets.capture import capture_layers
from deepspec.targets.fingerprint import fingerprint_of
from deepspec.targets.layers import LayerMemory, cache_argument, inspect_layers

# Without cuDNN's, which makes a plan for each new shape: documents are of as many lengths as there are documents.
DOCUMENT_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
        self.adapter = adapter_for(model.config)
        self.model = model.eval().requires_grad_(False)
        self._decoder = self.adapter.decoder(model)
        self.config = cast(PreTrainedConfig, self._decoder.config)
        self.name_or_path = name_or_path
        self.revision = revision
        self._layers = self.adapter.layers(model)
        self._head = self.adapter.head(model)
        self.logit_scale = self.adapter.logit_scale(self.config)
        self.final_logit_softcapping = self.adapter.final_logit_softcapping(self.config)
        self.cache_argument = cache_argument(self._decoder)
        if self._head.weight.is_cuda:
            fuse_norms(model)
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

    @cached_property
    def memory(self) -> LayerMemory:
        """What each layer remembers of the tokens before. Runs two tokens through the model, once."""
        return inspect_layers(self._layers, self._run_two_tokens)

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer carries a state over a row, which no mask can hide from the next document."""
        return bool(self.memory.mixers)

    @torch.no_grad()
    def features(self, batch: TokenBatch, layer_ids: Sequence[int]) -> TargetFeatures:
        """Features of whole documents, for training. Values at padding positions are undefined, but finite.

        Args:
            batch: padded or packed, on the target's device. Packed documents of a recurrent target are computed in
                rows of their own, which is how its state begins anew at each of them.
            layer_ids: captured layers, -1 = embedding output.
        """
        if batch.is_packed and self.is_recurrent:
            return self._features_by_document(batch, layer_ids)
        layout = batch.documents if batch.is_packed else None
        with attend_with(self.config, DOCUMENTS, layout), sdpa_kernel(DOCUMENT_BACKENDS):
            return self.hidden_states(
                layer_ids, input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            )

    def _features_by_document(self, batch: TokenBatch, layer_ids: Sequence[int]) -> TargetFeatures:
        """One document a row, padded, in passes that are no larger than the packed batch."""
        rows, tokens = batch.input_ids.shape
        width = self.hidden_size * len(layer_ids)
        context = torch.zeros(rows, tokens, width, dtype=self.dtype, device=self.device)
        final = torch.zeros(rows, tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        for part in one_document_a_row(batch):
            features = self.features(part.batch, layer_ids)
            for row, document in enumerate(part.documents):
                place = (document.row, document.columns)
                context[place] = features.context[row, : document.length]
                final[place] = features.final[row, : document.length]
        return TargetFeatures(context, final)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: Cache, layer_ids: Sequence[int] = ()
    ) -> TargetFeatures:
        """One decoding step over new tokens, inside `attend_with`; what layers remember is written into `cache`.

        Args:
            input_ids: [batch, tokens]
            position_ids: [batch, tokens], absolute.
            layer_ids: captured layers; with none, `context` is empty.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": True, self.cache_argument: cache}
        return self.hidden_states(layer_ids, **inputs)

    def logits(self, final: Tensor) -> Tensor:
        """Next-token logits in float32, scaled and capped as the target does it: [..., hidden] -> [..., vocab]."""
        logits = self._head(final).float()
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.final_logit_softcapping is not None:
            logits = self.final_logit_softcapping * torch.tanh(logits / self.final_logit_softcapping)
        return logits

    def hidden_states(self, layer_ids: Sequence[int], **inputs: Any) -> TargetFeatures:
        """Captured layers and final states of a forward pass of the decoder with these arguments."""
        with capture_layers(self._layers, layer_ids) as captured:
            final = self._decoder(**inputs).last_hidden_state
        if not layer_ids:
            return TargetFeatures(final.new_empty(*final.shape[:2], 0), final)
        return TargetFeatures(torch.cat([captured[i].to(final.device) for i in layer_ids], dim=-1), final)

    def _run_two_tokens(self, cache: Cache) -> None:
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        with attend_with(self.config, DOCUMENTS, None):
            self.forward(ids, torch.arange(2, device=self.device)[None], cache)
