"""What every draft has: the target's frozen embedding and head, the config's settings, and trained weights."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deepspec.drafts.confidence import ConfidenceHead
from deepspec.drafts.configuration import DraftSettings
from deepspec.drafts.families import family_of
from deepspec.drafts.heads import MarkovHead
from deepspec.drafts.vocabulary import DraftVocabulary
from deepspec.kernels.losses import soft_cap

LENT = ("embed_tokens.weight", "lm_head.weight")  # the target's, frozen


class TargetWeights(Protocol):
    """What a draft copies from its target."""

    @property
    def embedding_weight(self) -> Tensor:
        """[vocab, hidden]"""

    @property
    def head_weight(self) -> Tensor:
        """[vocab, hidden]"""

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """In order."""

    @property
    def final_norm(self) -> nn.Module: ...


class DraftModel(DraftVocabulary, PreTrainedModel):
    """Base of the drafts: `fc` joins the captured states, `layers` and `norm` make the states that the head reads.

    A subclass names its `layer_class` and calls `_freeze_target_weights` and `post_init` at the end of its `__init__`.
    """

    base_model_prefix = ""
    norms_context = True  # a norm behind `fc`
    soft_labels = False  # whether its cross-entropy is that of the target's distribution, not of the true tokens
    layer_class: Callable[..., nn.Module]  # (config, family)

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        family = family_of(config)
        self.settings = DraftSettings.of(config)
        self.checkpoint_activations = False  # while training: keep only the layers' inputs for the backward pass
        captured = len(self.settings.target_layer_ids)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(captured * config.hidden_size, config.hidden_size, bias=False)
        if self.norms_context:
            self.hidden_norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(self.layer_class(config, family) for _ in range(config.num_hidden_layers))
        self.norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, self.settings.draft_vocab_size or config.vocab_size, bias=False)
        self.make_vocabulary(config.vocab_size, self.settings.draft_vocab_size)
        self.markov_head: MarkovHead | None = None
        self.confidence_head: ConfidenceHead | None = None
        self.rotary_emb = family.rotary(config)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but the embedding and the head stay frozen. `load_draft` checks more."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_target_weights()
        return loaded

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context_features: Tensor,
        anchor_columns: Tensor,
        block_mask: Tensor,
    ) -> Tensor:
        """Draft behind many anchors of whole documents at once, for training; nothing of another document is seen.

        Args:
            input_ids: [batch, tokens]
            position_ids: [batch, tokens], 0 where a document begins.
            context_features: [batch, tokens, captured layers * hidden]
            anchor_columns: [batch, blocks], the last known token of each block; anything in range where `block_mask` is
                off.
            block_mask: bool [batch, blocks], False = padding block, which sees no context; its output means nothing.

        Returns:
            Hidden states after the final norm [batch, blocks, draft_length, hidden]: place k (from 0) predicts the
            token at anchor + k + 1.
        """
        raise NotImplementedError

    def start_from_target(self, target: TargetWeights) -> None:
        """Begin as a part of the target. Raises ConfigError where there is no such part."""
        raise NotImplementedError

    @property
    def algorithm(self) -> str:
        """dspark, dflash or eagle3"""
        return self.settings.algorithm

    @property
    def draft_length(self) -> int:
        """The most tokens that it drafts in a round."""
        return self.settings.draft_length

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        return self.settings.target_layer_ids

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of everything but the embedding and the head that the target lends."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    @torch.no_grad()
    def tie_to_target(self, target: TargetWeights, names: Container[str] = LENT) -> None:
        """Copy the target's embedding and head, or only what is named.

        Raises:
            ValueError: the target's shapes differ from the draft's.
        """
        for name, lent, module, weight in (
            ("embedding", "embed_tokens.weight", self.embed_tokens, target.embedding_weight),
            ("head", "lm_head.weight", self.lm_head, target.head_weight),
        ):
            if lent not in names:
                continue
            expected = [self.config.vocab_size, self.config.hidden_size]
            if list(weight.shape) != expected:
                raise ValueError(
                    f"the target's {name} has shape {list(weight.shape)}, the draft's config says {expected}: build "
                    "the draft's config from this target"
                )
            module.weight.copy_(self.rows_of(weight) if module is self.lm_head else weight)

    def compile_layers(self, backend: str = "inductor") -> None:
        """torch.compile every layer in place; they share one compilation. Attention is a kernel of its own."""
        for layer in self.layers:
            layer.compile(dynamic=True, backend=backend)

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings, scaled as the target's: [...] -> [..., hidden]"""
        embedding = self.embed_tokens(tokens).to(self.fc.weight.dtype)
        return embedding if self.settings.embedding_scale == 1 else embedding * self.settings.embedding_scale

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U_k through the frozen head, scaled and capped as the target's logits, in float32.

        [..., hidden] -> [..., vocab of the draft]
        """
        logits = self.lm_head(hidden).float()
        if self.settings.logit_scale != 1:
            logits = logits * self.settings.logit_scale
        return logits if self.settings.logit_softcap is None else soft_cap(logits, self.settings.logit_softcap)

    def _freeze_target_weights(self) -> None:
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
