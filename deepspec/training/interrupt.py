"""SIGTERM or SIGUSR1 (a preemption notice) asks a run to save and stop.

It does so after the step it is in, or at once where that step waits for a feature server.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """While entered, these signals set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        in_main_thread = threading.current_thread() is threading.main_thread()  # elsewhere Python refuses handlers
        self._previous = {number: signal.signal(number, self._request) for number in SIGNALS if in_main_thread}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
