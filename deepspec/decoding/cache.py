"""Preallocated key/value caches by slot: written by absolute position, rewound by position, never cropped or re-padded.

Column j of a slot holds position j. Columns at or beyond a row's length may hold stale values of rejected tokens; no
mask shows them and the next round overwrites them, so a rejection costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache


class KeyValueStore:
    """Keys and values of all layers, each [slots, kv_heads, columns, head_dim]; zero, thus finite, until written."""

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int, dtype: torch.dtype, device: torch.device):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, columns, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [rows, kv_heads, tokens, head_dim] of `slots` [rows] at `positions` [rows, tokens]."""
        rows = slots[:, None]
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, positions] = values.transpose(1, 2)

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` columns of a slot: once per finished request, to keep the active slots together."""
        for tensor in (self.keys, self.values):
            tensor[:, destination, :, :length] = tensor[:, source, :, :length]


class SlotCache(Cache):
    """The target's cache, as Transformers attention sees it; `begin` says what the next forward pass is about."""

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[])
        self.store = KeyValueStore(config, slots, columns, dtype, device)
        self._slots = torch.arange(0)
        self._positions = torch.arange(0)
        self._columns: int | None = None

    def begin(self, slots: Tensor, positions: Tensor, columns: int | None) -> None:
        """Prepare a forward pass.

        Args:
            slots: [rows]; with `columns`, the first ones in order.
            positions: [rows, tokens], where the new keys and values go.
            columns: attend that many columns of each slot; None = attend the new tokens alone (prefill).
        """
        self._slots, self._positions, self._columns = slots, positions, columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [rows, kv_heads, tokens, head_dim] and return what to attend, [rows, kv_heads, columns, head_dim]."""
        self.store.write(layer_idx, self._slots, self._positions, key_states, value_states)
        if self._columns is None:
            return key_states, value_states
        rows = len(self._slots)
        return (
            self.store.keys[layer_idx, :rows, :, : self._columns],
            self.store.values[layer_idx, :rows, :, : self._columns],
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
