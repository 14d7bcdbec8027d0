"""The DSpark draft (arXiv 2607.05147, section 3); without its heads it is DFlash (arXiv 2602.06036).

A block reads the anchor token and behind it mask tokens, one a position. Where it samples from the anchor, each slot
predicts the token behind its own position, the anchor's the first. Where it fills in (DFlash's own convention), each
mask predicts the token of its own position and the anchor's slot nothing; it is left out of everything behind the
backbone. So in both, slot k = 1..G of those that predict is about the token at anchor + k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    initialization,
)

from deepspec.config import ConfigError
from deepspec.drafts.backbone import DraftLayer, KeyValue, SandwichDraftLayer
from deepspec.drafts.base import DraftModel, TargetWeights
from deepspec.drafts.confidence import build_confidence_head
from deepspec.drafts.heads import build_markov_head
from deepspec.kernels.attention import ContextSpans
from deepspec.text import some


class DSparkModel(DraftModel):
    """Parallel backbone, optional sequential and confidence heads, and the target's frozen embedding and head."""

    _no_split_modules = ["DraftLayer", "SandwichDraftLayer"]  # noqa: RUF012  (Transformers declares no ClassVar)
    layer_class = DraftLayer

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.markov_head = build_markov_head(config)
        self.confidence_head = build_confidence_head(config)
        self._freeze_target_weights()
        self.post_init()

    @property
    def block_size(self) -> int:
        """Input slots, see `DraftSettings`."""
        return self.settings.block_size

    @property
    def mask_token_id(self) -> int:
        assert self.settings.mask_token_id is not None, "only Eagle3 has none"
        return self.settings.mask_token_id

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
        context = self.project_context(context_features)
        anchor_positions = position_ids.gather(1, anchor_columns)
        return self._run_blocks(
            input_ids.gather(1, anchor_columns),
            anchor_positions,
            self.context_key_values(context, position_ids),
            self._spans(anchor_columns, anchor_positions * block_mask),
        )

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

    def _draft_layers(self) -> list[DraftLayer]:
        return cast("list[DraftLayer]", list(self.layers))

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
        hidden = self.embed(tokens)
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
