"""Speed and memory of the optimizer steps, without the time of evaluation and saving."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Meter:
    """Adds up steps until `read`, then starts again."""

    def __init__(self, device: torch.device):
        self.device = device
        self._restart()

    @contextmanager
    def step(self, tokens: int) -> Iterator[None]:
        """Around one optimizer step over `tokens` tokens (of all ranks), which ends synchronised with the device."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.tokens += tokens
        self.steps += 1

    def read(self) -> dict[str, float]:
        """tokens_per_second (all ranks, without padding), step_seconds, peak_memory_gib (this rank)."""
        figures = {
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "step_seconds": self.seconds / max(1, self.steps),
            "peak_memory_gib": _peak_memory(self.device) / 2**30,
        }
        self._restart()
        return figures

    def _restart(self) -> None:
        self.seconds, self.tokens, self.steps = 0.0, 0, 0


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
