"""Seconds of work on a device, by its own clock where it has one, and the ceilings that these are held against.

python -m benchmarks.device_clock     # prints the ceilings as a line of JSON
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

COPIED_BYTES = 2**32  # many times what a cache holds
PRODUCT_SIZE = 8192


def device_seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The median time of `run`, after one that is not counted."""
    run()
    if device.type != "cuda":
        return statistics.median(_host_seconds(run) for _ in range(repeats))
    torch.cuda.synchronize(device)
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _host_seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def copy_bandwidth(device: torch.device, size: int = COPIED_BYTES) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes within the device."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return 2 * size / device_seconds(lambda: into.copy_(source), device)


def product_rate(device: torch.device, size: int = PRODUCT_SIZE) -> float:
    """FLOP per second of a square product of random matrices, in bfloat16 on a GPU and float32 on a CPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = torch.randn(2, size, size, dtype=dtype, device=device)
    return 2 * size**3 / device_seconds(lambda: left @ right, device)


if __name__ == "__main__":
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = {} if here.type == "cuda" else {"size": 1024}
    print(json.dumps({"copy_bandwidth": copy_bandwidth(here, **small), "product_rate": product_rate(here, **small)}))
