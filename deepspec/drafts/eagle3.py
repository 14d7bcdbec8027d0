"""The Eagle3 draft (EAGLE-3, arXiv 2503.01840): one layer that reads its own state again for every further token.

Token x_j is read together with the state before it: h_{j-1}, which `fc` makes of the target's captured layers, or in a
chain the draft's own output (before the final norm) of the step before. So column j of the context holds the key and
value of (h_{j-1}, x_j) at RoPE position j - 1, and column 0 holds nothing that anybody sees. A chain starts at an
anchor a: step t (from 0) reads token a + t at RoPE position a - 1 + t, attends the context columns 1..a-1 and the keys
of its own steps 0..t, and predicts token a + t + 1.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from deepspec.config import ConfigError
from deepspec.drafts.backbone import KeyValue, Projections, Rotation
from deepspec.drafts.base import DraftModel, TargetWeights
from deepspec.drafts.families import Family
from deepspec.kernels.attention import ContextSpans
from deepspec.kernels.chain_attention import chain_attention


class ChainAttention(Projections):
    """Reads embedding and state side by side."""

    def __init__(self, config: PreTrainedConfig, family: Family):
        super().__init__(config, family, input_size=2 * config.hidden_size)

    def forward(
        self, inputs: Tensor, rotation: Rotation, context: KeyValue, spans: ContextSpans, own: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """One step of every chain.

        Args:
            inputs: [batch, chains, 2 * hidden]
            rotation: of the step's positions, [batch, chains, head_dim].
            context: keys and values of the context.
            spans: context columns that each chain sees.
            own: keys and values of the earlier steps, each [batch, kv_heads, chains, steps, head_dim]; None = none yet.

        Returns:
            [batch, chains, hidden], and `own` with this step behind.
        """
        queries, (keys, values) = self._split(self.q_proj(inputs), self.q_norm), self._project(inputs)
        queries, keys = self.apply_rotary(queries, keys, *rotation)
        keys, values = keys[:, :, :, None], values[:, :, :, None]
        if own is not None:
            keys, values = torch.cat([own[0], keys], dim=3), torch.cat([own[1], values], dim=3)
        attended = chain_attention(queries, *context, keys, values, spans, self.scale)
        return self.o_proj(attended.transpose(1, 2).flatten(2)), (keys, values)


class Eagle3Layer(nn.Module):
    """Norms of its own for embedding and state; the state that is not normed goes around the attention."""

    def __init__(self, config: PreTrainedConfig, family: Family):
        super().__init__()
        self.self_attn = ChainAttention(config, family)
        self.mlp = family.mlp(config)
        self.hidden_norm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)

    def joined(self, embedding: Tensor, state: Tensor) -> Tensor:
        """What the attention reads: twice [..., hidden] -> [..., 2 * hidden]"""
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(state)], dim=-1)

    def forward(
        self,
        embedding: Tensor,
        state: Tensor,
        rotation: Rotation,
        context: KeyValue,
        spans: ContextSpans,
        own: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """Embedding and state [batch, chains, hidden] -> the next state; else as `ChainAttention.forward`."""
        attended, own = self.self_attn(self.joined(embedding, state), rotation, context, spans, own)
        state = state + attended
        return state + self.mlp(self.post_attention_layernorm(state)), own


class Eagle3Model(DraftModel):
    """One layer over embedding and state, and the target's frozen embedding and head."""

    _no_split_modules = ["Eagle3Layer"]  # noqa: RUF012  (Transformers declares no ClassVar)
    norms_context = False
    soft_labels = True
    layer_class = Eagle3Layer

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self._freeze_target_weights()
        self.post_init()

    @property
    def layer(self) -> Eagle3Layer:
        return cast(Eagle3Layer, self.layers[0])

    def start_from_target(self, target: TargetWeights) -> None:
        """No layer of a target reads two states at once. Raises ConfigError."""
        raise ConfigError(
            "draft.start_from_target=true: an Eagle3 layer reads embedding and state side by side, no layer of a "
            "target is like it; set draft.start_from_target=false"
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context_features: Tensor,
        anchor_columns: Tensor,
        block_mask: Tensor,
    ) -> Tensor:
        return self.norm(self.chain_states(input_ids, position_ids, context_features, anchor_columns, block_mask))

    def chain_states(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context_features: Tensor,
        anchor_columns: Tensor,
        block_mask: Tensor,
    ) -> Tensor:
        """Training-time test: `draft_length` steps of a chain from every anchor, which read the true tokens.

        Args: see `forward`. An anchor is not the first token of its document, because no state is before it.

        Returns:
            The states [batch, blocks, draft_length, hidden], before the final norm.
        """
        states = self.context_states(context_features)
        previous = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        context = self.context_key_values(input_ids, previous, position_ids)
        anchor_positions = position_ids.gather(1, anchor_columns)
        spans = self._spans(anchor_columns, anchor_positions * block_mask)
        state = previous.gather(1, anchor_columns[..., None].expand(-1, -1, previous.shape[-1]))
        own, found = None, []
        for step in range(self.draft_length):
            # Past the end of a document or row the token is anyone's: nothing there is supervised, nor seen by others.
            tokens = input_ids.gather(1, (anchor_columns + step).clamp(max=input_ids.shape[1] - 1))
            state, own = self.step(tokens, state, anchor_positions + step, context, spans, own)
            found.append(state)
        return torch.stack(found, dim=2)

    def context_states(self, features: Tensor) -> Tensor:
        """h of the target's captured states: [..., captured layers * hidden] -> [..., hidden]"""
        return self.fc(features.to(self.fc.weight.dtype))

    def context_key_values(self, tokens: Tensor, previous: Tensor, positions: Tensor) -> KeyValue:
        """Rotated keys and values of tokens in context.

        Args:
            tokens: [batch, tokens]
            previous: [batch, tokens, hidden], from `context_states`, of the token before each.
            positions: of the tokens, [batch, tokens] or [1, tokens]; what is made at position 0 means nothing.

        Returns:
            Two tensors [batch, kv_heads, tokens, head_dim].
        """
        inputs = self.layer.joined(self.embed(tokens), previous)
        return self.layer.self_attn.key_values(inputs, self._rotation(previous, positions))

    def step(
        self,
        tokens: Tensor,
        state: Tensor,
        positions: Tensor,
        context: KeyValue,
        spans: ContextSpans,
        own: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """One step of every chain.

        Args:
            tokens: [batch, chains], the latest one of each chain.
            state: [batch, chains, hidden], of the token before it.
            positions: of the tokens, [batch, chains].
            context, spans: see `ContextSpans`.
            own: what the step before returned; None = the first.

        Returns:
            The state of these tokens [batch, chains, hidden], before the final norm, and `own` for the next step.
        """
        inputs = (self.embed(tokens), state, self._rotation(state, positions), context, spans, own)
        if self.checkpoint_activations and self.training:
            return checkpoint(self.layer, *inputs, use_reentrant=False)
        return self.layer(*inputs)

    def anchor_spans(self, anchor_positions: Tensor) -> ContextSpans:
        """Of anchors [batch, chains] where column j of the context holds position j."""
        return self._spans(anchor_positions, anchor_positions)

    def _spans(self, anchor_columns: Tensor, anchor_positions: Tensor) -> ContextSpans:
        """The columns right before each anchor but for that of position 0: both [batch, chains]."""
        return ContextSpans(anchor_columns - (anchor_positions - 1).clamp(min=0), anchor_columns)

    def _rotation(self, states: Tensor, positions: Tensor) -> Rotation:
        """A token is rotated by the position of the state it is read with."""
        return self.rotary_emb(states, (positions - 1).clamp(min=0))


class Qwen3Eagle3Model(Eagle3Model):
    config_class = Qwen3Config


class LlamaEagle3Model(Eagle3Model):
    """Without query and key norms."""

    config_class = LlamaConfig
