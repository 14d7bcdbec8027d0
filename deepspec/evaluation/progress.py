"""What an evaluation shows while it decodes."""

from __future__ import annotations

import sys
from collections import defaultdict

from rich.console import Console

from deepspec.evaluation.records import Record
from deepspec.progress import BarOrLines

WIDTH_OF_FILES = 120


def make_console(*, is_main: bool) -> Console:
    """Standard output; silent except on rank 0, and wide enough for a table where it is no terminal."""
    console = Console(file=sys.stdout, quiet=not is_main)
    return console if console.is_terminal else Console(file=sys.stdout, quiet=not is_main, width=WIDTH_OF_FILES)


class EvaluationProgress(BarOrLines):
    """Prompts done on this rank, and tau so far of the set that is being decoded."""

    def __init__(self, prompts: int, *, is_main: bool):
        super().__init__("evaluate", prompts, make_console(is_main=is_main), is_main=is_main)
        self._done = 0
        self._emitted: dict[tuple[str, float], int] = defaultdict(int)
        self._rounds: dict[tuple[str, float], int] = defaultdict(int)

    def finished(self, record: Record) -> None:
        """Count a decoded chunk."""
        group = (record.set_name, record.temperature)
        rounds = [r for completion in record.speculative.completions for r in completion.rounds]
        self._emitted[group] += sum(r.emitted for r in rounds)
        self._rounds[group] += len(rounds)
        self._done += len(record.by_prompt())
        tau = f"tau {self._emitted[group] / self._rounds[group]:.2f}" if self._rounds[group] else "tau -"
        figures = f"{record.set_name}, temperature {record.temperature:g}: {tau}"
        line = f"prompt {self._done}/{self._total}  {figures}"
        self._show(self._done, figures, line, at_once=self._done == self._total)
