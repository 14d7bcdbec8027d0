"""Where the tokens of a pass are: of each row some consecutive positions, packed one row's after another's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from deepspec.kernels.key_values import PADDING
from deepspec.targets.attention import visible_columns


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
