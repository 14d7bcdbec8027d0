"""What is shown while the target writes."""

from __future__ import annotations

import sys
import time

from rich.console import Console

from deepspec.progress import BarOrLines

SECONDS_OF_RATE = 30.0


class WritingProgress(BarOrLines):
    """Rows done on this rank, tokens a second, rows under way, remaining time. Silent except on rank 0."""

    def __init__(self, total: int, *, what: str = "rows", is_main: bool = True):
        console = Console(file=sys.stdout, quiet=not is_main)
        super().__init__(what, total, console, is_main=is_main, speed_estimate_period=300)
        self._what = what
        self._marks: list[tuple[float, int]] = []  # when so many tokens were written

    def update(self, done: int, tokens: int, in_flight: int) -> None:
        """Args: `tokens` written so far, those of unfinished rows included."""
        now = time.monotonic()
        self._marks.append((now, tokens))
        while now - self._marks[0][0] > SECONDS_OF_RATE and len(self._marks) > 2:
            self._marks.pop(0)
        seconds = now - self._marks[0][0]
        rate = (tokens - self._marks[0][1]) / seconds if seconds > 0 else 0.0
        figures = f"{max(rate, 0):,.0f} tokens/s, {in_flight} under way"
        self._show(done, figures, f"{done}/{self._total} {self._what}, {figures}")
