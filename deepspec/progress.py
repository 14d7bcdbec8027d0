"""What long commands show while they work: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class BarOrLines:
    """A bar with figures of the command's own. Silent where the console is."""

    def __init__(self, what: str, total: int, console: Console, *, is_main: bool, speed_estimate_period: float = 30.0):
        """Args: `speed_estimate_period` in seconds, of the remaining time."""
        self._console = console
        self._total = total
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if is_main and console.is_terminal:
            columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
            rest = (TextColumn("eta"), TimeRemainingColumn())
            self._bar = Progress(*columns, *rest, console=console, speed_estimate_period=speed_estimate_period)
            self._task = self._bar.add_task(what, total=total, figures="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, done: int, figures: str, line: str, *, at_once: bool = False) -> None:
        """Args: `line` is said where there is no bar; `at_once` though the last one is not ten seconds ago."""
        if self._bar:
            self._bar.update(self._task, completed=done, figures=figures)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or at_once:
            self._last_line = time.monotonic()
            self.say(line)
