"""Decoder layers of the parallel backbone: queries from the blocks, keys and values from context and block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from deepspec.drafts.families import Family, head_dim_of
from deepspec.kernels.attention import ContextSpans, block_attention

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [batch or 1, tokens, head_dim]
KeyValue = tuple[Tensor, Tensor]  # rotated keys and values, each [batch, kv_heads, tokens, head_dim]


class Projections(nn.Module):
    """Queries, keys and values of the family's attention, and what follows it."""

    def __init__(self, config: PreTrainedConfig, family: Family, input_size: int | None = None):
        """Args: `input_size` of queries, keys and values; None = the hidden size."""
        super().__init__()
        self.apply_rotary = family.apply_rotary
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim_of(config)
        width, bias = input_size or config.hidden_size, getattr(config, "attention_bias", False)
        keys_are_values = getattr(config, "attention_k_eq_v", False)
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = None if keys_are_values else nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = family.norm(self.head_dim, eps=config.rms_norm_eps) if family.query_key_norm else None
        self.k_norm = family.norm(self.head_dim, eps=config.rms_norm_eps) if family.query_key_norm else None
        self.v_norm = family.value_norm(self.head_dim, eps=config.rms_norm_eps) if family.value_norm else None
        self.scale = self.head_dim**-0.5 if family.attention_scale is None else family.attention_scale

    def key_values(self, states: Tensor, rotation: Rotation) -> KeyValue:
        """Keys and values of context states [batch, tokens, input size]."""
        keys, values = self._project(states)
        _, keys = self.apply_rotary(keys[:, :0], keys, *rotation)
        return keys, values

    def _project(self, states: Tensor) -> KeyValue:
        """Keys before their rotation, and values."""
        projected = self.k_proj(states)
        values = projected if self.v_proj is None else self.v_proj(states)
        return self._split(projected, self.k_norm), self._split(values, self.v_norm)

    def _split(self, projected: Tensor, norm: nn.Module | None) -> Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]"""
        split = projected.unflatten(-1, (-1, self.head_dim))
        return (split if norm is None else norm(split)).transpose(1, 2)


class DraftAttention(Projections):
    """Context and block share the key and value projections and the key norm (DFlash section 3.2)."""

    def forward(self, hidden: Tensor, rotation: Rotation, context: KeyValue, spans: ContextSpans) -> Tensor:
        """Attend.

        Args:
            hidden: [batch, blocks, slots, hidden]
            rotation: of the blocks' positions, [batch, blocks * slots, head_dim].
            context: keys and values of the context.
            spans: context columns that each block sees.

        Returns:
            [batch, blocks, slots, hidden]
        """
        blocks = hidden.shape[1:3]
        flat = hidden.flatten(1, 2)
        queries, (keys, values) = self._split(self.q_proj(flat), self.q_norm), self._project(flat)
        queries, keys = self.apply_rotary(queries, keys, *rotation)
        attended = block_attention(
            queries.unflatten(2, blocks),
            *context,
            keys.unflatten(2, blocks),
            values.unflatten(2, blocks),
            spans,
            self.scale,
        )
        return self.o_proj(attended.permute(0, 2, 3, 1, 4).flatten(3))


class DraftLayer(nn.Module):
    """Pre-norm attention and pre-norm MLP."""

    def __init__(self, config: PreTrainedConfig, family: Family):
        super().__init__()
        self.self_attn = DraftAttention(config, family)
        self.mlp = family.mlp(config)
        self.input_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotation: Rotation, context: KeyValue, spans: ContextSpans) -> Tensor:
        """Same shapes as `DraftAttention.forward`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, context, spans)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class SandwichDraftLayer(DraftLayer):
    """Gemma 4's: norms also behind attention and MLP, and a fixed factor on the layer's output."""

    layer_scalar: Tensor

    def __init__(self, config: PreTrainedConfig, family: Family):
        super().__init__(config, family)
        self.pre_feedforward_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = family.norm(config.hidden_size, eps=config.rms_norm_eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, hidden: Tensor, rotation: Rotation, context: KeyValue, spans: ContextSpans) -> Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), rotation, context, spans)
        hidden = hidden + self.post_attention_layernorm(attended)
        hidden = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        return hidden * self.layer_scalar
