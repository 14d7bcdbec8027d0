"""The DSpark draft (arXiv 2607.05147, section 3); without its heads it is DFlash (arXiv 2602.06036).

A block reads the anchor token and behind it mask tokens, one a position. Where it samples from the anchor, each slot
predicts the token behind its own position, the anchor's the first. Where it fills in (DFlash's own convention), each
mask predicts the token of its own position and the anchor's slot nothing; it is left out of everything behind the
backbone. So in both, slot k = 1..G of those that predict is about the token at anchor + k.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    initialization,
)

from deepspec.config import ConfigError
from deepspec.drafts.backbone import DraftLayer, KeyValue, SandwichDraftLayer
from deepspec.drafts.confidence import build_confidence_head
from deepspec.drafts.configuration import DraftSettings, architecture_of
from deepspec.drafts.families import family_of
from deepspec.drafts.heads import build_markov_head
from deepspec.drafts.vocabulary import DraftVocabulary
from deepspec.kernels.attention import ContextSpans
from deepspec.kernels.losses import soft_cap
from deepspec.text import some

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


class DSparkModel(DraftVocabulary, PreTrainedModel):
    """Parallel backbone, optional sequential and confidence heads, and the target's frozen embedding and head."""

    base_model_prefix = ""
    _no_split_modules = ["DraftLayer", "SandwichDraftLayer"]  # noqa: RUF012  (Transformers declares no ClassVar)
    layer_class: type[DraftLayer] = DraftLayer

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        family = family_of(config)
        settings = DraftSettings.of(config)
        self.settings = settings
        self.checkpoint_activations = False  # while training: keep only the layers' inputs for the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(len(settings.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(self.layer_class(config, family) for _ in range(config.num_hidden_layers))
        self.norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, settings.draft_vocab_size or config.vocab_size, bias=False)
        self.make_vocabulary(config.vocab_size, settings.draft_vocab_size)
        self.markov_head = build_markov_head(config)
        self.confidence_head = build_confidence_head(config)
        self.rotary_emb = family.rotary(config)
        self._freeze_target_weights()
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers, but the embedding and the head stay frozen. `load_draft` checks more."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._freeze_target_weights()
        return loaded

    @property
    def algorithm(self) -> str:
        """dspark or dflash"""
        return self.settings.algorithm

    @property
    def block_size(self) -> int:
        """Input slots, see `DraftSettings`."""
        return self.settings.block_size

    @property
    def draft_length(self) -> int:
        """Tokens drafted a round, which is the number of slots in every output."""
        return self.settings.draft_length

    @property
    def mask_token_id(self) -> int:
        return self.settings.mask_token_id

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

    @torch.no_grad()
    def start_from_target(self, target: TargetWeights) -> None:
        """Start as the target's last layers and final norm, reading its last captured layer as context.

        Where the layers have the same parts under the same names, the block passes through the end of the target from
        its first step on and only has to learn what the skipped layers did.

        Raises:
            ConfigError: the draft has more layers than the target, or the target's have other parts.
        """
        depth, available = len(self.layers), len(target.decoder_layers)
        if depth > available:
            raise ConfigError(
                f"draft.num_layers={depth}: with draft.start_from_target it can be at most the target's "
                f"{available} layers"
            )
        pairs = list(zip(self.layers, list(target.decoder_layers)[-depth:], strict=True))
        for number, (mine, theirs) in enumerate(pairs, start=available - depth):
            if difference := _difference(mine, theirs):
                raise ConfigError(
                    f"draft.start_from_target=true: layer {number} of the target, a {type(theirs).__name__}, "
                    f"{difference} a layer of {type(self).__name__}; set draft.start_from_target=false"
                )
        for mine, theirs in pairs:
            mine.load_state_dict(theirs.state_dict())
        self.norm.load_state_dict(target.final_norm.state_dict())
        hidden = self.config.hidden_size
        self.fc.weight[:, -hidden:] += torch.eye(hidden, device=self.fc.weight.device)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context_features: Tensor,
        anchor_columns: Tensor,
        block_mask: Tensor,
    ) -> Tensor:
        """Draft all blocks of whole documents at once, for training. A block sees nothing of another document.

        Args:
            input_ids: [batch, tokens]
            position_ids: [batch, tokens], 0 where a document begins.
            context_features: [batch, tokens, captured layers * hidden]
            anchor_columns: [batch, blocks]; anything in range where `block_mask` is off.
            block_mask: bool [batch, blocks], False = padding block, which sees no context; its output means nothing.

        Returns:
            Hidden states after the final norm of the slots that predict [batch, blocks, draft_length, hidden].
        """
        context = self.project_context(context_features)
        anchor_positions = position_ids.gather(1, anchor_columns)
        return self._run_blocks(
            input_ids.gather(1, anchor_columns),
            anchor_positions,
            self.context_key_values(context, position_ids),
            self._spans(anchor_columns, anchor_positions * block_mask),
        )

    def compile_layers(self, backend: str = "inductor") -> None:
        """torch.compile every layer in place; they share one compilation. Attention is a kernel of its own."""
        for layer in self._draft_layers():
            layer.compile(dynamic=True, backend=backend)

    def project_context(self, features: Tensor) -> Tensor:
        """H_ctx = RMSNorm(W_c [H_l1; ...; H_lm]).

        [batch, tokens, captured layers * hidden] -> [batch, tokens, hidden]
        """
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))

    def context_key_values(self, context: Tensor, positions: Tensor) -> list[KeyValue]:
        """Each layer's rotated keys and values of projected context.

        Args:
            context: [batch, tokens, hidden], from `project_context`.
            positions: absolute, [batch, tokens] or [1, tokens].

        Returns:
            Per layer two tensors [batch, kv_heads, tokens, head_dim].
        """
        rotation = self.rotary_emb(context, positions)
        return [layer.self_attn.key_values(context, rotation) for layer in self._draft_layers()]

    @torch.no_grad()
    def draft_block(
        self,
        anchor_tokens: Tensor,
        anchor_positions: Tensor,
        context_cache: Sequence[KeyValue],
    ) -> Tensor:
        """Draft one block per sequence from cached context, for decoding.

        Args:
            anchor_tokens: [batch], the last known token.
            anchor_positions: [batch], its absolute position.
            context_cache: per layer keys and values [batch, kv_heads, columns, head_dim]; column j holds position j.
                Columns from the anchor on are ignored, but must be finite.

        Returns:
            Hidden states after the final norm of the slots that predict [batch, draft_length, hidden].
        """
        spans = self._spans(anchor_positions[:, None], anchor_positions[:, None])
        return self._run_blocks(anchor_tokens[:, None], anchor_positions[:, None], context_cache, spans)[:, 0]

    def base_logits(self, hidden: Tensor) -> Tensor:
        """U_k through the frozen head, scaled and capped as the target's logits, in float32.

        [..., hidden] -> [..., vocab of the draft]
        """
        logits = self.lm_head(hidden).float()
        if self.settings.logit_scale != 1:
            logits = logits * self.settings.logit_scale
        return logits if self.settings.logit_softcap is None else soft_cap(logits, self.settings.logit_softcap)

    def _draft_layers(self) -> list[DraftLayer]:
        return cast("list[DraftLayer]", list(self.layers))

    def _freeze_target_weights(self) -> None:
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def _spans(self, anchor_columns: Tensor, context_length: Tensor) -> ContextSpans:
        """The columns right before each anchor: both [batch, blocks]."""
        if self.settings.context_window is not None:
            context_length = context_length.clamp(max=self.settings.context_window)
        return ContextSpans(anchor_columns - context_length, anchor_columns)

    def _run_blocks(
        self, anchor_tokens: Tensor, anchor_positions: Tensor, context: Sequence[KeyValue], spans: ContextSpans
    ) -> Tensor:
        """[batch, blocks] anchors -> [batch, blocks, draft_length, hidden]"""
        slots = torch.arange(self.block_size, device=anchor_tokens.device)
        tokens = torch.where(slots == 0, anchor_tokens[..., None], self.mask_token_id)
        hidden = self.embed_tokens(tokens).to(self.fc.weight.dtype)
        if self.settings.embedding_scale != 1:
            hidden = hidden * self.settings.embedding_scale
        rotation = self.rotary_emb(hidden, (anchor_positions[..., None] + slots).flatten(1))
        for layer, key_values in zip(self._draft_layers(), context, strict=True):
            if self.checkpoint_activations and self.training:
                hidden = checkpoint(layer, hidden, rotation, key_values, spans, use_reentrant=False)
            else:
                hidden = layer(hidden, rotation, key_values, spans)
        return self.norm(hidden[:, :, -self.draft_length :])

    def _init_weights(self, module: nn.Module) -> None:
        """The family's initialisation, except for the two tables of a sequential head: W1 is N(0, 1) and W2 is 0.

        Training then starts from the backbone alone, and W2 learns at full speed: with W1 at the family's 0.02 its
        gradient is 50 times smaller than its neighbours' and the head trails for hundreds of steps.
        """
        if self.markov_head is not None and module is self.markov_head.markov_w2:
            initialization.zeros_(self.markov_head.markov_w2.weight)
        elif self.markov_head is not None and module is self.markov_head.markov_w1:
            initialization.normal_(self.markov_head.markov_w1.weight)
        else:
            super()._init_weights(module)


class Qwen3DSparkModel(DSparkModel):
    config_class = Qwen3Config


class DFlashDraftModel(DSparkModel):
    """DFlash that fills in: the class that z-lab, vLLM and SGLang know."""

    config_class = Qwen3Config


class Gemma4DSparkModel(DSparkModel):
    config_class = Gemma4TextConfig
    layer_class = SandwichDraftLayer


class LlamaDSparkModel(DSparkModel):
    """Of checkpoints from before every draft was Qwen3-shaped; loaded, never made anew."""

    config_class = LlamaConfig


def draft_class(config: PreTrainedConfig) -> type[DSparkModel]:
    """The class of a draft's config, see `architecture_of`."""
    classes = (Qwen3DSparkModel, DFlashDraftModel, Gemma4DSparkModel, LlamaDSparkModel)
    return {one.__name__: one for one in classes}[architecture_of(config)]


def _difference(mine: nn.Module, theirs: nn.Module) -> str:
    """How the parts of a target's layer differ from a draft's, to be followed by "a layer of ..."; empty if equal."""
    ours = {name: list(part.shape) for name, part in mine.state_dict().items()}
    others = {name: list(part.shape) for name, part in theirs.state_dict().items()}
    if missing := sorted(ours.keys() - others.keys()):
        return f"lacks {some(missing)} of"
    if unknown := sorted(others.keys() - ours.keys()):
        return f"has {some(unknown)}, unlike"
    wrong = [f"{name} {others[name]} instead of {shape}" for name, shape in ours.items() if others[name] != shape]
    return f"has {some(wrong)} of" if wrong else ""


def build_draft(
    config: PreTrainedConfig, target: TargetWeights | None = None, *, seed: int = 0, kept_tokens: Tensor | None = None
) -> DSparkModel:
    """A fresh draft in float32 with seeded weights and, given a target, its embedding and head.

    Args:
        kept_tokens: what it can propose, see `DraftVocabulary.keep_tokens`; for a draft that cannot propose all.

    Raises:
        ConfigError: no draft for this family.
        ValueError: `target` does not fit the config.
    """
    family_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = draft_class(config)(config)
    if kept_tokens is not None:
        draft.keep_tokens(kept_tokens)
    if target is not None:
        draft.tie_to_target(target)
    return draft
