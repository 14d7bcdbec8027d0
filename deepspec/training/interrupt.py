"""SIGTERM asks a run to save and stop after the step it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, SIGTERM sets `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
