"""Preallocated key/value caches by slot: written by absolute position, rewound by position, never cropped or re-padded.

Column j of a slot holds position j. Columns at or beyond a row's length may hold stale values of rejected tokens; no
mask shows them and the next round overwrites them, so a rejection costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache


class Span:
    """Where the tokens of one forward pass go: the same number for every row, from its own start on in its own slot."""

    def __init__(self, slots: Sequence[int], starts: Sequence[int], tokens: int, device: torch.device):
        self.slots = slots
        self.starts = starts
        self.tokens = tokens
        pairs = torch.tensor([slots, starts], device=device)
        self.rows = pairs[0, :, None]  # [rows, 1]
        self.positions = pairs[1, :, None] + torch.arange(tokens, device=device)  # [rows, tokens]

    @property
    def columns(self) -> int:
        """Columns that the longest row needs."""
        return max(self.starts) + self.tokens


class KeyValueStore:
    """Keys and values of all layers, each [slots, kv_heads, columns, head_dim]; zero, thus finite, until written."""

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int, dtype: torch.dtype, device: torch.device):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, columns, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [rows, kv_heads, tokens, head_dim] of `span`."""
        if len(span.slots) == 1:  # a plain slice costs half as much as an index
            slot, start, end = span.slots[0], span.starts[0], span.starts[0] + span.tokens
            self.keys[layer][slot, :, start:end] = keys[0]
            self.values[layer][slot, :, start:end] = values[0]
        else:
            self.keys[layer][span.rows, :, span.positions] = keys.transpose(1, 2)
            self.values[layer][span.rows, :, span.positions] = values.transpose(1, 2)

    def read(self, layer: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Views of the first slots and columns: keys and values [rows, kv_heads, columns, head_dim]."""
        return self.keys[layer][:rows, :, :columns], self.values[layer][:rows, :, :columns]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` columns of a slot; only when a request ends and none waits to take its place."""
        for tensor in (*self.keys, *self.values):
            tensor[destination, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Make a slot finite again after a row that was not: a masked NaN would still spoil a sum."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()


class SlotCache(Cache):
    """The target's cache, as Transformers attention sees it; `begin` says what the next forward pass is about."""

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[])
        self.store = KeyValueStore(config, slots, columns, dtype, device)
        self._span: Span | None = None
        self._attend_slots = False

    def begin(self, span: Span, *, attend_slots: bool) -> None:
        """Prepare a forward pass.

        Args:
            span: where the new keys and values go.
            attend_slots: attend the slots up to the longest row's end (then they must be the first slots, in order), or
                the new tokens alone (prefill).
        """
        self._span, self._attend_slots = span, attend_slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [rows, kv_heads, tokens, head_dim] and return what to attend, [rows, kv_heads, columns, head_dim]."""
        span = self._span
        assert span is not None, "begin comes before a forward pass"
        self.store.write(layer_idx, span, key_states, value_states)
        if self._attend_slots:
            return self.store.read(layer_idx, len(span.slots), span.columns)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not used: positions and masks are always given."""
        return 0
