"""CUDA graphs: a function of tensors is captured once per shape and replayed, which spares the host its launches.

On a CPU nothing is captured, but the function runs on the same fixed buffers, so that the tests see what a GPU would.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]
COLUMNS_AT_ONCE = 256
WARM_UP = 2  # runs before the capture, which let libraries make their workspaces


class Graphs:
    """The graphs of one engine, by key."""

    def __init__(self, device: torch.device):
        self._device = device
        self._captured: dict[Hashable, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def run(self, key: Hashable, function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
        """`function(*inputs)`, which may read and write other tensors too, but always the same ones.

        Args:
            key: what shapes and control flow depend on. The function that first came with it is run ever after.

        Returns:
            The graph's own outputs, the same tensors each time.
        """
        if key not in self._captured:
            with torch.cuda.device(self._device) if self._pool else nullcontext():
                self._captured[key] = _Captured(function, inputs, self._pool)
        return self._captured[key].replay(inputs)

    def reruns(self) -> dict[Hashable, Callable[[], None]]:
        """What runs each graph once more on the inputs that it has, by key: for measurements."""
        return {key: captured.run for key, captured in self._captured.items()}


class _Captured:
    def __init__(self, function: Callable[..., Tensors], inputs: Tensors, pool: Any):
        self._function = function
        self._inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        self._graph: torch.cuda.CUDAGraph | None = None
        if pool is None:
            self._outputs = function(*self._inputs)
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with no_collection(), torch.cuda.graph(self._graph, pool=pool):
            self._outputs = function(*self._inputs)

    def replay(self, inputs: Tensors) -> Tensors:
        _copy(self._inputs, inputs)
        self.run()
        return self._outputs

    def run(self) -> None:
        if self._graph is None:
            _copy(self._outputs, self._function(*self._inputs))
        else:
            self._graph.replay()


@contextmanager
def no_collection() -> Iterator[None]:
    """Within the block nothing is collected: a capture fails when a graph of an engine that is garbage is destroyed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _copy(own: Tensors, new: Tensors) -> None:
    for into, tensor in zip(own, new, strict=True):
        if into is not None and tensor is not None:
            into.copy_(tensor, non_blocking=True)


def cache_columns(needed: int) -> int:
    """How many columns of the caches a graph reads that needs so many."""
    return -(-needed // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE


def ladder(largest: int) -> list[int]:
    """Sizes that are captured: powers of two below `largest`, and itself."""
    sizes = [1]
    while sizes[-1] * 2 < largest:
        sizes.append(sizes[-1] * 2)
    return sorted({*sizes, largest})


def next_size(needed: int, sizes: Sequence[int]) -> int:
    """The smallest size that is enough."""
    return next(size for size in sizes if size >= needed)
