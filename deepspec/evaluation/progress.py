"""What an evaluation shows while it decodes: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepspec.evaluation.records import Record

SECONDS_BETWEEN_LINES = 10.0
WIDTH_OF_FILES = 120


def make_console(*, is_main: bool) -> Console:
    """Standard output; silent except on rank 0, and wide enough for a table where it is no terminal."""
    console = Console(file=sys.stdout, quiet=not is_main)
    return console if console.is_terminal else Console(file=sys.stdout, quiet=not is_main, width=WIDTH_OF_FILES)


class EvaluationProgress:
    """Prompts done on this rank, and tau so far of the set that is being decoded."""

    def __init__(self, prompts: int, *, is_main: bool):
        self._console = make_console(is_main=is_main)
        self._total = prompts
        self._done = 0
        self._emitted: dict[tuple[str, float], int] = defaultdict(int)
        self._rounds: dict[tuple[str, float], int] = defaultdict(int)
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if is_main and self._console.is_terminal:
            columns = (TextColumn("evaluate"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, TextColumn("eta"), TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("evaluate", total=prompts, figures="")

    def __enter__(self) -> EvaluationProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def finished(self, record: Record) -> None:
        """Count a decoded chunk."""
        group = (record.set_name, record.temperature)
        rounds = [r for completion in record.speculative.completions for r in completion.rounds]
        self._emitted[group] += sum(r.emitted for r in rounds)
        self._rounds[group] += len(rounds)
        self._done += len(record.by_prompt())
        tau = f"tau {self._emitted[group] / self._rounds[group]:.2f}" if self._rounds[group] else "tau -"
        figures = f"{record.set_name}, temperature {record.temperature:g}: {tau}"
        if self._bar:
            self._bar.update(self._task, completed=self._done, figures=figures)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = time.monotonic()
            self.say(f"prompt {self._done}/{self._total}  {figures}")

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
