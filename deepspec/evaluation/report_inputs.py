"""Reading the folders that a report is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError, read_jsonl
from deepspec.decoding.recorded_rounds import METRICS_FILE
from deepspec.evaluation.summary import SAMPLES_FILE

TRAINING_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class ReportInputs:
    """What is known about each draft, by the name that the report gives it."""

    evaluations: dict[str, dict[str, Any]]  # metrics.json
    samples: dict[str, list[dict[str, Any]]]  # samples.jsonl
    runs: dict[str, list[dict[str, Any]]]  # metrics.jsonl of training
    run_folders: dict[str, Path]


def read_inputs(evaluations: dict[str, Path], runs: dict[str, Path]) -> ReportInputs:
    """
    Args:
        evaluations: draft name -> output_dir of eval.py.
        runs: draft name -> output_dir of train.py.

    Raises:
        ConfigError: no evaluation was named.
        DataError: a file is missing or damaged; the message names it.
    """
    if not evaluations:
        raise ConfigError("no evaluation to report: give at least one --eval NAME=FOLDER (output_dir of eval.py)")
    return ReportInputs(
        {name: _read_metrics(folder / METRICS_FILE) for name, folder in evaluations.items()},
        {name: _read_samples(folder / SAMPLES_FILE) for name, folder in evaluations.items()},
        {name: _read_training(folder / TRAINING_FILE) for name, folder in runs.items()},
        runs,
    )


def _read_metrics(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"{file}: no such file; run eval.py with output_dir={file.parent} first")
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: damaged ({error}); run eval.py again") from error
    if not isinstance(metrics, dict) or not metrics.get("results"):
        raise DataError(f"{file}: holds no results of eval.py; give its output_dir")
    if any(
        "cond_accept_estimates" not in values for result in metrics["results"] for values in result["sets"].values()
    ):
        raise DataError(f"{file}: written by an earlier version; run eval.py again, which decodes nothing anew")
    return metrics


def _read_samples(file: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(file)]


def _read_training(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file; give the output_dir of train.py")
    rows = []
    for place, row in read_jsonl(file):
        if not isinstance(row.get("step"), int):
            raise DataError(f"{place}: expected a row of training metrics with a step")
        rows.append(row)
    return rows
