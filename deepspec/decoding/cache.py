"""Preallocated caches by slot: keys and values written and rewound by absolute position, never cropped or re-padded.

Contiguous rather than paged: attention then reads plain views of the first slots, and the slots of a measurement are
about equally long, so pages would save little memory.

Column j of a slot holds position j. Columns at or beyond a row's length may hold stale values of rejected tokens; no
mask shows them and the next round overwrites them, so a rejection costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from deepspec.decoding.recurrent import RecurrentStates
from deepspec.kernels.dispatch import runs_in_triton
from deepspec.kernels.key_values import PADDING, append_key_values
from deepspec.targets import Target
from deepspec.targets.attention import visible_columns
from deepspec.targets.layers import KeyValueShape


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
        self._visible: dict[tuple[int | None, int], Tensor] = {}
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

    def visible(self, window: int | None, group: int) -> Tensor:
        """What the tokens of each row may attend, for `grouped_attention`; made once a pass for all layers alike.

        Args:
            window: of a sliding layer, tokens; None = all before.
            group: query heads that share a key/value head.

        Returns:
            bool [rows, 1, group * longest, end]
        """
        if (window, group) not in self._visible:
            columns = torch.arange(self.end, device=self.positions.device)
            visible = visible_columns(self.to_rows(self.positions)[..., None], columns, window)
            self._visible[window, group] = visible.repeat(1, group, 1)[:, None]
        return self._visible[window, group]

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
