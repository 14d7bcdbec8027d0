"""Where the metrics of a run go: always a JSONL file, on request wandb. Only rank 0 writes."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from deepspec.checkpoints import CheckpointError
from deepspec.config import TrainRun
from deepspec.files import write_atomically

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """One JSON object per line, one line per step: `OUTPUT/metrics.jsonl`."""

    def __init__(self, output_dir: str | Path, resumed_step: int):
        """Open for appending. Rows after `resumed_step`, which will be written again, and a torn line are removed."""
        self.path = Path(output_dir) / METRICS_FILE
        if self.path.exists():
            kept = [row for row in read_metrics(output_dir) if row["step"] <= resumed_step]
            write_atomically(self.path, "".join(f"{json.dumps(row)}\n" for row in kept))

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Raises CheckpointError when the file cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"could not write the metrics of step {step} to {self.path}: {error}. Earlier checkpoints are "
                "untouched: free some space or make the file writable, then give the same command again to continue"
            ) from error


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, oldest first, without lines that a crash tore; empty when there is none."""
    path = Path(output_dir) / METRICS_FILE
    if not path.exists():
        return []
    rows = (_parsed(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [row for row in rows if row is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


class Trackers:
    """wandb through accelerate. A tracker that fails is dropped with a warning; training goes on."""

    def __init__(self, accelerator: Accelerator, config: TrainRun):
        self.accelerator = accelerator
        self.active = config.logging.wandb.mode != "disabled"
        self._attempt(lambda: self._start(config))

    def log(self, step: int, row: dict[str, Any]) -> None:
        self._attempt(lambda: self.accelerator.log(row, step=step))

    def close(self) -> None:
        self._attempt(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
        self.active = False

    def _start(self, config: TrainRun) -> None:
        wandb = config.logging.wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        options = {
            "id": _run_id(Path(config.output_dir)) if self.accelerator.is_main_process else None,
            "resume": "allow",
            "mode": wandb.mode,
            "name": wandb.name or Path(config.output_dir).name,
            "entity": wandb.entity,
            "dir": config.output_dir,
        }
        self.accelerator.init_trackers(wandb.project, config=asdict(config), init_kwargs={"wandb": options})

    def _attempt(self, action: Callable[[], Any]) -> None:
        if not self.active:
            return
        try:
            action()
        except Exception as error:
            logger.warning("wandb stopped working and is off for the rest of this run: %s", error)
            self.active = False


def _run_id(output_dir: Path) -> str:
    """The same wandb run before and after a resume."""
    file = output_dir / "wandb_run_id"
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex[:12])
    return file.read_text(encoding="utf-8").strip()
