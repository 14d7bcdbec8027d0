"""Everything that is told about a run while it trains: progress, metrics.jsonl, wandb."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from accelerate import Accelerator

from deepspec.config import TrainRun
from deepspec.training.log import MetricsLog, Trackers
from deepspec.training.progress import progress_report


class Reporter:
    """Rank 0 writes; on the other ranks this does nothing."""

    def __init__(self, config: TrainRun, accelerator: Accelerator, *, start: int, steps: int):
        self._trackers = Trackers(accelerator, config)
        self._log = MetricsLog(config.output_dir, start) if accelerator.is_main_process else None
        self._progress = progress_report(steps, start, is_main=accelerator.is_main_process)
        self._exits = ExitStack()
        self.last_row: dict[str, Any] = {}

    def __enter__(self) -> Reporter:
        self._exits.callback(self._trackers.close)
        self._exits.enter_context(self._progress)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def say(self, text: str) -> None:
        self._progress.say(text)

    def step(self, done: int, loss: float | None, row: dict[str, Any]) -> None:
        """After step `done`.

        Args:
            loss: global; None if the step had no anchor.
            row: its metrics; empty when the step is not logged.
        """
        self._progress.step(done, loss, row)
        if row:
            self.last_row = row
            self._trackers.log(done, row)
            if self._log is not None:
                self._log.write(done, row)
