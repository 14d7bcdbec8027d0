"""Speed and memory of the optimizer steps, without the time of evaluation and saving."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PARTS = ("wait", "features", "forward", "backward", "optimizer")


@dataclass
class StepCount:
    """What one optimizer step worked on, over all ranks."""

    tokens: int = 0  # without padding
    anchors: int = 0  # blocks
    slots: int = 0  # that carry loss


class Meter:
    """Adds up steps until `read`, then starts again."""

    def __init__(self, device: torch.device, flops: Callable[[int, int, int], float], peak: float | None):
        """
        Args:
            flops: of a step over so many tokens, blocks and supervised slots.
            peak: FLOP/s that all ranks together could reach; None = unknown.
        """
        self.device = device
        self.flops = flops
        self.peak = peak
        self._restart()

    @contextmanager
    def step(self) -> Iterator[StepCount]:
        """Around one optimizer step, which fills in what it worked on and ends synchronised with the device."""
        began = time.perf_counter()
        count = StepCount()
        yield count
        self.seconds += time.perf_counter() - began
        self.tokens += count.tokens
        self.anchors += count.anchors
        self.slots += count.slots
        self.steps += 1

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around one of PARTS. On a GPU its own time is taken, without waiting for it."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            began = time.perf_counter()
            yield
            self._parts[name] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """tokens_per_second, anchors_per_second (of all ranks), step_seconds with its parts, peak_memory_gib (of this).

        The parts are seconds a step: `wait` for data and other ranks, `features` not hidden behind other work,
        `forward`, `backward` (with the exchange of gradients; with DeepSpeed also the optimizer), `optimizer`.
        `model_flops_utilization` is there where the peak is known.
        """
        for name, start, end in self._events:
            end.synchronize()
            self._parts[name] += start.elapsed_time(end) / 1e3
        steps, seconds = max(1, self.steps), max(self.seconds, 1e-9)
        figures = {
            "tokens_per_second": self.tokens / seconds,
            "anchors_per_second": self.anchors / seconds,
            "step_seconds": self.seconds / steps,
            **{f"{name}_seconds": total / steps for name, total in self._parts.items()},
            "peak_memory_gib": peak_memory(self.device) / 2**30,
        }
        if self.peak:
            rate = self.flops(self.tokens, self.anchors, self.slots) / seconds
            figures["model_flops_utilization"] = rate / self.peak
        self._restart()
        return figures

    def _restart(self) -> None:
        self.seconds, self.tokens, self.anchors, self.slots, self.steps = 0.0, 0, 0, 0, 0
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
