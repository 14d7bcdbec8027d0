"""Preallocated caches by slot: keys and values written and rewound by absolute position, never cropped or re-padded.

Contiguous rather than paged: attention then reads plain views of the first slots, and the slots of a measurement are
about equally long, so pages would save little memory.

Column j of a slot holds position j. Columns at or beyond a row's length may hold stale values of rejected tokens; no
mask shows them and the next round overwrites them, so a rejection costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from deepspec.decoding.recurrent import RecurrentStates
from deepspec.decoding.span import Span
from deepspec.kernels.dispatch import runs_in_triton
from deepspec.kernels.key_values import append_key_values
from deepspec.targets import Target
from deepspec.targets.layers import KeyValueShape


class KeyValueStore:
    """Keys and values by layer, each [slots, heads, columns, width]; zero, thus finite, until written."""

    def __init__(self, shapes: Mapping[int, KeyValueShape], slots: int, columns: int, device: torch.device):
        def zeros(heads: int, width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, heads, columns, width, dtype=dtype, device=device)

        self.keys = {layer: zeros(*shape.key, shape.dtype) for layer, shape in shapes.items()}
        self.values = {layer: zeros(*shape.value, shape.dtype) for layer, shape in shapes.items()}

    def write(self, layer: int, span: Span, keys: Tensor, values: Tensor) -> None:
        """Write keys, values [1, heads, total, width] of `span`."""
        if span.start is not None:  # a plain slice costs half as much as an index
            slot, columns = span.slots[0], slice(span.start, span.start + span.total)
            self.keys[layer][slot, :, columns] = keys[0]
            self.values[layer][slot, :, columns] = values[0]
            return
        keys, values = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        if keys.shape == values.shape and runs_in_triton(keys, None):
            append_key_values(self.keys[layer], self.values[layer], keys, values, span.slot_of, span.written)
        else:  # a repeated token writes the same once more
            self.keys[layer][span.slot_of, :, span.positions] = keys
            self.values[layer][span.slot_of, :, span.positions] = values

    def read(self, layer: int, slots: Sequence[int], columns: int) -> tuple[Tensor, Tensor]:
        """The first columns of some slots: keys and values [rows, heads, columns, width].

        Views if the slots follow each other, as those of the active rows do.
        """
        where: Any = slice(slots[0], slots[-1] + 1) if _follow_each_other(slots) else list(slots)
        return self.keys[layer][where, :, :columns], self.values[layer][where, :, :columns]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` columns of a slot; only when a request ends and none waits to take its place."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[destination, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Make a slot finite again after a row that was not: a masked NaN would still spoil a sum."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[slot].zero_()


class SlotCache(Cache):
    """The target's cache, as the layers of Transformers see it; `target_pass` says what each forward pass is about."""

    def __init__(self, target: Target, slots: int, columns: int, longest: int):
        """
        Args:
            columns: positions per slot.
            longest: the most tokens of a row in a pass that may be rejected in part.
        """
        super().__init__(layers=[])
        self.store = KeyValueStore(target.memory.key_values, slots, columns, target.device)
        self.states = RecurrentStates(target, slots, longest, self)
        self.span: Span | None = None

    @staticmethod
    def bytes_per_slot(target: Target, columns: int, longest: int) -> int:
        """Of one slot, see `__init__`."""
        key_values = sum(shape.bytes for shape in target.memory.key_values.values())
        return columns * key_values + RecurrentStates.bytes_per_slot(target, longest)

    @contextmanager
    def during(self, span: Span, *, is_certain: bool) -> Iterator[None]:
        """Within the block, the target runs over `span`; `is_certain` if all of its tokens will be kept."""
        self.span = span
        with self.states.during(span, is_certain=is_certain):
            yield

    def keep(self, kept: Mapping[int, int], longest: int) -> None:
        """The first so many tokens of these slots' rows stay, of `longest` in a row of the pass. To be called after
        each pass that was not certain."""
        self.states.keep(kept, longest)

    def move(self, source: int, destination: int, length: int) -> None:
        """Move a slot's row, which holds `length` positions."""
        self.store.move(source, destination, length)
        self.states.move(source, destination)

    def begin(self, slots: Sequence[int]) -> None:
        """Make slots ready for new rows; keys and values need nothing, since no mask shows those of others."""
        self.states.begin(slots)

    def clear(self, slot: int) -> None:
        """Forget a slot whose row was not finite."""
        self.store.clear(slot)
        self.states.begin([slot])

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [1, heads, total, width] and return what to attend, [rows, heads, columns, width]."""
        assert self.span is not None, "a span comes before a forward pass"
        self.store.write(layer_idx, self.span, key_states, value_states)
        return self.store.read(layer_idx, self.span.slots, self.span.end)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Not used: positions and masks are always given."""
        return 0

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.of_mixer("conv", state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.of_mixer("recurrent", state_idx)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Take in [rows, channels, tokens] and return them behind those before."""
        return self.states.append_conv(conv_states, state_idx)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return self.states.replace_recurrent(recurrent_states, state_idx)


def _follow_each_other(slots: Sequence[int]) -> bool:
    return list(slots) == list(range(slots[0], slots[0] + len(slots)))
