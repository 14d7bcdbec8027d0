"""What is shown while the target writes: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_RATE = 30.0


class WritingProgress:
    """Rows done on this rank, tokens a second, rows under way, remaining time. Silent except on rank 0."""

    def __init__(self, total: int, *, what: str = "rows", is_main: bool = True):
        self._console = Console(file=sys.stdout, quiet=not is_main)
        self._what, self._total, self._done = what, total, 0
        self._marks: list[tuple[float, int]] = []  # when so many tokens were written
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if is_main and self._console.is_terminal:
            columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
            rest = (TextColumn("eta"), TimeRemainingColumn())
            self._bar = Progress(*columns, *rest, console=self._console, speed_estimate_period=300)
            self._task = self._bar.add_task(what, total=total, figures="")

    def __enter__(self) -> WritingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, tokens: int, in_flight: int) -> None:
        """Args: `tokens` written so far, those of unfinished rows included."""
        now = time.monotonic()
        self._marks.append((now, tokens))
        while now - self._marks[0][0] > SECONDS_OF_RATE and len(self._marks) > 2:
            self._marks.pop(0)
        seconds = now - self._marks[0][0]
        rate = (tokens - self._marks[0][1]) / seconds if seconds > 0 else 0.0
        figures = f"{max(rate, 0):,.0f} tokens/s, {in_flight} under way"
        self._done = done
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures)
        elif now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.say(f"{done}/{self._total} {self._what}, {figures}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
