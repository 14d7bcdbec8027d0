"""Preallocated key/value caches by slot: written by absolute position, rewound by position, never cropped or re-padded.

Contiguous rather than paged: attention then reads plain views of the first slots, and the slots of a measurement are
about equally long, so pages would save little memory.

Column j of a slot holds position j. Columns at or beyond a row's length may hold stale values of rejected tokens; no
mask shows them and the next round overwrites them, so a rejection costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from deepspec.kernels.dispatch import runs_in_triton
from deepspec.kernels.key_values import PADDING, append_key_values


class Span:
    """Tokens of one forward pass: of each row some consecutive positions, one row's after another's, in one packed row.

    Rows with different numbers of tokens cost no padding, except in the attention, which sees `to_rows`.
    """

    def __init__(
        self, slots: Sequence[int], starts: Tensor, counts: Tensor | int, *, total: int, longest: int, end: int
    ):
        """
        Args:
            slots: [rows], where each row's keys and values lie.
            starts: long [rows], the position of each row's first token.
            counts: long [rows], each at least 1; or one number for all rows.
            total: sum of the counts, or more: the last token is then repeated.
            longest: the largest count, or a bound of it.
            end: the largest start + count, or a bound of it.
        """
        self.slots, self.total, self.longest, self.end = slots, total, longest, end
        self.start: int | None = None  # of the only row, where the host knows it
        self._index: Tensor | None = None  # [rows, longest], the packed token of each place
        self._place: Tensor | None = None  # [total], the place of each packed token
        self._repeated: Tensor | None = None  # bool [total]
        steps = torch.arange(longest, device=starts.device)
        if isinstance(counts, int):
            self.positions = (starts[:, None] + steps).flatten()  # [total]
            return
        ends = counts.cumsum(0)
        first = ends - counts
        places = torch.arange(total, device=starts.device)
        self._repeated = places >= ends[-1]
        token = places.minimum(ends[-1] - 1)
        row_of = torch.searchsorted(ends, token, right=True)
        offset = token - first[row_of]
        self.positions = starts[row_of] + offset
        self._index = first[:, None] + steps.minimum(counts[:, None] - 1)
        self._place = row_of * longest + offset

    @classmethod
    def of(cls, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int], device: torch.device) -> Span:
        """From numbers that the host knows."""
        longest, total = max(counts), sum(counts)
        same = longest * len(counts) == total
        span = cls(
            slots,
            torch.tensor(starts, device=device),
            longest if same else torch.tensor(counts, device=device),
            total=total,
            longest=longest,
            end=max(start + count for start, count in zip(starts, counts, strict=True)),
        )
        span.start = starts[0] if len(slots) == 1 else None
        return span

    @cached_property
    def slot_of(self) -> Tensor:
        """[total], the slot of each packed token."""
        device = self.positions.device
        if isinstance(self.slots, range):  # without the host's memory, which a CUDA graph could not read again
            slots = torch.arange(self.slots.start, self.slots.stop, device=device)
        else:
            slots = torch.tensor(self.slots, device=device)
        if self._place is None:
            return slots.repeat_interleave(self.longest)
        return slots[self._place // self.longest]

    @cached_property
    def written(self) -> Tensor:
        """[total], the positions, PADDING where the last token is repeated."""
        if self._repeated is None:
            return self.positions
        return self.positions.masked_fill(self._repeated, PADDING)

    def to_rows(self, packed: Tensor) -> Tensor:
        """[total, ...] -> [rows, longest, ...]; a shorter row repeats its last token."""
        if self._index is None:
            return packed.unflatten(0, (len(self.slots), self.longest))
        return packed[self._index]

    def to_packed(self, rows: Tensor) -> Tensor:
        """[rows, longest, ...] -> [total, ...]"""
        flat = rows.flatten(0, 1)
        return flat if self._place is None else flat[self._place]


class KeyValueStore:
    """Keys and values of all layers, each [slots, kv_heads, columns, head_dim]; zero, thus finite, until written."""

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int, dtype: torch.dtype, device: torch.device):
        shape = (slots, config.num_key_value_heads, columns, _head_dim(config))
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [1, kv_heads, total, head_dim] of `span`."""
        if span.start is not None:  # a plain slice costs half as much as an index
            slot, columns = span.slots[0], slice(span.start, span.start + span.total)
            self.keys[layer][slot, :, columns] = keys[0]
            self.values[layer][slot, :, columns] = values[0]
            return
        keys, values = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        if runs_in_triton(keys, None):
            append_key_values(self.keys[layer], self.values[layer], keys, values, span.slot_of, span.written)
        else:  # a repeated token writes the same once more
            self.keys[layer][span.slot_of, :, span.positions] = keys
            self.values[layer][span.slot_of, :, span.positions] = values

    def read(self, layer: int, slots: Sequence[int], columns: int) -> tuple[Tensor, Tensor]:
        """The first columns of some slots: keys and values [rows, kv_heads, columns, head_dim].

        Views if the slots follow each other, as those of the active rows do.
        """
        where: Any = slice(slots[0], slots[-1] + 1) if _follow_each_other(slots) else list(slots)
        return self.keys[layer][where, :, :columns], self.values[layer][where, :, :columns]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` columns of a slot; only when a request ends and none waits to take its place."""
        for tensor in (*self.keys, *self.values):
            tensor[destination, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Make a slot finite again after a row that was not: a masked NaN would still spoil a sum."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()


def bytes_per_slot(config: PreTrainedConfig, columns: int, dtype: torch.dtype) -> int:
    """Of a `KeyValueStore`."""
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return heads * columns * _head_dim(config) * dtype.itemsize


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class SlotCache(Cache):
    """The target's cache, as Transformers attention sees it; `span` says what the next forward pass is about."""

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int, dtype: torch.dtype, device: torch.device):
        super().__init__(layers=[])
        self.store = KeyValueStore(config, slots, columns, dtype, device)
        self.span: Span | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [1, kv_heads, total, head_dim] and return what to attend, [rows, kv_heads, columns, head_dim]."""
        assert self.span is not None, "a span comes before a forward pass"
        self.store.write(layer_idx, self.span, key_states, value_states)
        return self.store.read(layer_idx, self.span.slots, self.span.end)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not used: positions and masks are always given."""
        return 0


def _follow_each_other(slots: Sequence[int]) -> bool:
    return list(slots) == list(range(slots[0], slots[0] + len(slots)))
