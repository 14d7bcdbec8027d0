"""What each decoder layer remembers of the tokens before: keys and values by position, or a state that moves on.

Found by running two tokens through the model and listening to what its layers hand to their cache, so that no family's
config has to be understood.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from deepspec.config import ConfigError

StateName = tuple[str, int]  # "conv" or "recurrent", and its number within the layer


@dataclass(frozen=True)
class KeyValueShape:
    """Of one position of one layer. Latent attention stores its latents in place of keys and values."""

    key: tuple[int, int]  # heads, width
    value: tuple[int, int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


@dataclass(frozen=True)
class State:
    """One tensor that a layer replaces at every token."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class RecurrentMixer:
    """The module of a layer that carries a state over a row: convolution, delta net, Mamba."""

    module: Any
    states: dict[StateName, State] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of its states."""
        return sum(state.bytes for state in self.states.values())

    def __call__(self, hidden: Tensor, cache: Cache) -> Tensor:
        """[rows, tokens, hidden] -> the same; reads and moves on the states that `cache` hands out."""
        return self.module(hidden, **{cache_argument(self.module): cache})

    @contextmanager
    def as_single_steps(self) -> Iterator[None]:
        """Within the block, a pass of several tokens computes what as many single steps would.

        Transformers keeps the time step of Nemotron-H's Mamba-2 layers above a limit in passes of several tokens and
        not in single steps, of which plain decoding is made.
        """
        limited = getattr(self.module, "time_step_limit", None)
        if limited is None:
            yield
            return
        self.module.time_step_limit = (0.0, math.inf)
        try:
            yield
        finally:
            self.module.time_step_limit = limited


def cache_argument(module: nn.Module) -> str:
    """What this module's forward calls its cache; Transformers has renamed it."""
    parameters = inspect.signature(module.forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in parameters)


@dataclass(frozen=True)
class LayerMemory:
    """Of all layers, by layer index; a layer without either remembers nothing (a lone MLP, shared keys)."""

    key_values: dict[int, KeyValueShape]
    mixers: dict[int, RecurrentMixer]


@torch.no_grad()
def inspect_layers(layers: nn.ModuleList, run: Callable[[Cache], Any]) -> LayerMemory:
    """What the layers remember.

    Args:
        run: a forward pass of a row of two or more tokens with this cache.

    Raises:
        ConfigError: a layer remembers in a way that the decoder has no cache for.
    """
    listener = _Listener()
    modules = [m for m in layers.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    handles = [module.register_forward_pre_hook(listener.enter) for module in modules]
    handles += [module.register_forward_hook(listener.leave) for module in modules]
    try:
        run(listener)
    finally:
        for handle in handles:
            handle.remove()
    return LayerMemory(listener.key_values, listener.mixers)


class _Listener(Cache):
    """A cache that is always empty and notes what it is given, and by which module."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.key_values: dict[int, KeyValueShape] = {}
        self.mixers: dict[int, RecurrentMixer] = {}
        self._inside: list[nn.Module] = []

    def enter(self, module: nn.Module, args: tuple) -> None:
        self._inside.append(module)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._inside.pop()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        key, value = ((states.shape[1], states.shape[3]) for states in (key_states, value_states))
        self.key_values[layer_idx] = KeyValueShape(key, value, key_states.dtype)
        return key_states, value_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        return None

    get_recurrent_state = get_conv_state

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        shape = (*conv_states.shape[1:-1], conv_kernel_size or conv_states.shape[-1])
        return self._note(("conv", state_idx), conv_states, shape, layer_idx)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        return self._note(("recurrent", state_idx), recurrent_states, recurrent_states.shape[1:], layer_idx)

    def update_indexer(self, *_: Any, **__: Any) -> Tensor:
        raise ConfigError(
            f"layers of {type(self._inside[-1]).__name__} choose what to attend by an index of keys of their own, for "
            "which the decoder has no cache yet"
        )

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def _note(self, name: StateName, states: Tensor, shape: Any, layer_idx: int) -> Tensor:
        mixer = self.mixers.setdefault(layer_idx, RecurrentMixer(self._inside[-1]))
        mixer.states[name] = State(tuple(shape), states.dtype)
        return states
