"""Which kernels a piece of GPU work consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

SHOWN = 30  # kernels, those that take longest in all
NAME = 120  # characters of a kernel's name that are kept


def kernels_of(run: Callable[[], object]) -> dict[str, Any]:
    """`launches`, their `busy_ms`, and by kernel [name, launches, milliseconds in all], the longest first.

    Without a GPU there are none.
    """
    if not torch.cuda.is_available():
        return {"launches": 0, "busy_ms": 0.0, "longest": []}
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: event.self_device_time_total, reverse=True)
    longest = [[event.key[:NAME], event.count, event.self_device_time_total / 1e3] for event in kernels[:SHOWN]]
    return {
        "launches": sum(event.count for event in kernels),
        "busy_ms": sum(event.self_device_time_total for event in kernels) / 1e3,
        "longest": longest,
    }
