"""The state of layers that cannot be rewound (convolutions, delta nets, Mamba): snapshot and replay.

A pass whose tokens may be rejected starts from the state before it and leaves that untouched. It leaves two more things
per slot: the state behind all of its tokens, and what its mixers read. Once it is known how many tokens are kept, a row
that kept them all takes the state behind; any other runs its mixers once more over the kept tokens, from the state
before. So the family's own modules compute every state, and a slot takes two states and block_size + 1 hidden states a
layer, where one state per verified position would take block_size + 2 of what is by far the larger thing.

A pass whose tokens are all kept, a prompt or a plain step, moves the state on in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from deepspec.decoding.span import Span
from deepspec.targets import Target
from deepspec.targets.layers import RecurrentMixer, StateName

States = dict[StateName, Tensor]


class RecurrentStates:
    """Of all slots; empty for a target without such layers."""

    def __init__(self, target: Target, slots: int, longest: int, cache: Cache):
        """
        Args:
            longest: the most tokens of a row in a pass that may be rejected in part.
            cache: handed to the mixers; asks here for what they ask it.
        """
        self._mixers = target.memory.mixers
        self._cache = cache
        self._before = {layer: _zeros(mixer, slots, target.device) for layer, mixer in self._mixers.items()}
        self._behind = {layer: _zeros(mixer, slots, target.device) for layer, mixer in self._mixers.items()}
        self._read = {
            layer: torch.zeros(slots, longest, target.hidden_size, dtype=target.dtype, device=target.device)
            for layer in self._mixers
        }
        self._running: States = {}  # [rows, ...], those of the mixer that is running now

    @staticmethod
    def bytes_per_slot(target: Target, longest: int) -> int:
        """See `__init__`."""
        read = longest * target.hidden_size * target.dtype.itemsize
        return sum(2 * mixer.bytes + read for mixer in target.memory.mixers.values())

    @contextmanager
    def during(self, span: Span, *, is_certain: bool) -> Iterator[None]:
        """Within the block, mixers get one row a slot of `span` and the states of these slots."""
        with ExitStack() as exits:
            for layer, mixer in self._mixers.items():
                enter, leave = self._hooks(layer, span, is_certain=is_certain)
                exits.callback(mixer.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                exits.callback(mixer.module.register_forward_hook(leave).remove)
                if not is_certain:
                    exits.enter_context(mixer.as_single_steps())
            yield

    def keep(self, kept: Mapping[int, int], longest: int) -> None:
        """Move the states of these slots on over the first so many tokens of the last pass, which was not certain.

        Args:
            longest: tokens of a row in that pass. Not remembered here: a CUDA graph runs it without this object.
        """
        by_count: dict[int, list[int]] = {}
        for slot, count in kept.items():
            by_count.setdefault(count, []).append(slot)
        for count, slots in by_count.items() if self._mixers else ():
            for layer, mixer in self._mixers.items():
                if count == longest:
                    self._running = {name: state[slots] for name, state in self._behind[layer].items()}
                else:
                    self._running = {name: state[slots] for name, state in self._before[layer].items()}
                    with mixer.as_single_steps():
                        mixer(self._read[layer][slots, :count], self._cache)
                self._store(layer, slots)

    def move(self, source: int, destination: int) -> None:
        for states in self._before.values():
            for state in states.values():
                state[destination] = state[source]

    def begin(self, slots: Sequence[int]) -> None:
        """New rows, or ones that failed, start from nothing."""
        for states in self._before.values():
            for state in states.values():
                state[list(slots)] = 0

    def of_mixer(self, kind: str, number: int) -> Tensor | None:
        """A state of the mixer that is running; it may be changed in place."""
        return self._running.get((kind, number))

    def append_conv(self, new: Tensor, number: int) -> Tensor:
        """[rows, channels, tokens] -> the same behind the inputs of the convolution that came before."""
        state = self._running["conv", number]
        everything = torch.cat([state, new.to(state.dtype)], dim=-1)
        state.copy_(everything[..., -state.shape[-1] :])
        return everything

    def replace_recurrent(self, new: Tensor, number: int) -> Tensor:
        return self._running["recurrent", number].copy_(new)

    def _hooks(self, layer: int, span: Span, *, is_certain: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
        slots = span.slots
        is_view = isinstance(slots, range)
        where: Any = slice(slots.start, slots.stop) if isinstance(slots, range) else list(slots)

        def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            hidden = span.to_rows((args[0] if args else kwargs["hidden_states"])[0])
            before = {name: state[where] for name, state in self._before[layer].items()}
            if is_certain:
                self._running = before
            else:
                self._read[layer][where, : span.longest] = hidden
                self._running = {name: state[where] for name, state in self._behind[layer].items()}
                for name, state in self._running.items():
                    state.copy_(before[name])
            return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

        def leave(module: Any, args: tuple, output: Tensor) -> Tensor:
            if not is_view:
                self._store(layer, where)
            return span.to_packed(output)[None]

        return enter, leave

    def _store(self, layer: int, slots: list[int]) -> None:
        for name, state in self._before[layer].items():
            state[slots] = self._running[name]


def _zeros(mixer: RecurrentMixer, slots: int, device: torch.device) -> States:
    return {
        name: torch.zeros(slots, *state.shape, dtype=state.dtype, device=device) for name, state in mixer.states.items()
    }
