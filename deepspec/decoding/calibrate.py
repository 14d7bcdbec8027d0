"""Calibrate a draft's confidences: `python -m deepspec.decoding.calibrate checkpoint=FOLDER rounds=EVAL_DIR`.

EVAL_DIR is the output of eval.py over a calibration split, for example

    eval.py checkpoint=RUN eval.sets=[calibration_math,calibration_code,calibration_chat] eval.baseline=false

Writes calibration.json, which the schedulers read, and calibration.png beside the draft's weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from deepspec.arguments import run_command
from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.decoding.calibration import (
    CALIBRATION_FILE,
    RecordedRounds,
    calibrate,
    held_out_survival,
    predicted_survival,
)
from deepspec.decoding.recorded_rounds import read_source
from deepspec.decoding.reliability import Floats, reliability_bins
from deepspec.drafts.loading import find_draft_folder
from deepspec.environment import command_line, machine, versions
from deepspec.files import write_atomically
from deepspec.plotting import MUTED, PALETTE, figure_of

PLOT_FILE = "calibration.png"


@dataclass
class CalibrateOptions:
    """Fit the temperatures of a draft's confidence head to recorded rounds of a calibration split."""

    checkpoint: str = "???"  # draft folder, or run folder (its newest checkpoint)
    rounds: str = "???"  # output_dir of eval.py over sets whose names begin with "calibration"
    prompts_dir: str | None = None  # where those sets lie; null = as the evaluation recorded it
    temperature: float | None = None  # only prompts sampled at it; null = all
    bins: int = 10  # of the calibration error, of equal width over [0, 1]
    min_rounds: int = 1000  # refuse to fit fewer
    output_dir: str | None = None  # null = the draft's folder


def run(options: CalibrateOptions) -> dict[str, Any]:
    """Calibrate, write calibration.json and calibration.png, and return what the file holds.

    Raises:
        ConfigError, DataError, FileNotFoundError: see `deepspec.decoding.recorded_rounds.read_source`; too few rounds.
    """
    if options.bins < 1:
        raise ConfigError(f"bins={options.bins}: must be at least 1")
    draft_folder = find_draft_folder(options.checkpoint)
    source = read_source(options.rounds, draft_folder, temperature=options.temperature, prompts_dir=options.prompts_dir)
    rounds, prompts = source.rounds, sum(source.description["sets"].values())
    if len(rounds.confidences) < options.min_rounds or prompts < 2:
        raise DataError(
            f"rounds={options.rounds}: {len(rounds.confidences)} rounds of {prompts} prompts are too few to calibrate; "
            f"decode more of the calibration split (min_rounds={options.min_rounds}, at least 2 prompts)"
        )
    calibration = calibrate(rounds, options.bins)
    record = {
        "method": "sequential temperature scaling",
        **asdict(calibration),
        "rounds": len(rounds.confidences),
        "prompts": prompts,
        "bins": options.bins,
        "source": source.description,
        "machine": machine(),
        "versions": versions(),
        "command": command_line(),
    }
    folder = Path(options.output_dir) if options.output_dir else draft_folder
    write_atomically(folder / CALIBRATION_FILE, json.dumps(record, indent=1) + "\n")
    plot_calibration(rounds, record, folder / PLOT_FILE)
    return record


def plot_calibration(rounds: RecordedRounds, record: Mapping[str, Any], path: Path) -> None:
    """Observed against predicted survival, a panel per position: as trained, and calibrated on other prompts."""
    bins = record["bins"]
    curves = {
        "as trained": ("before", predicted_survival(rounds.confidences, [1.0] * rounds.slots)),
        "calibrated on other prompts": ("held_out", held_out_survival(rounds, bins)),
    }
    columns = min(4, rounds.slots)
    rows = -(-rounds.slots // columns)
    title = "Survival of drafted tokens, predicted and observed"
    with figure_of(path, max(5.0, 3.0 * columns), 1.2 + 3.0 * rows, title) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in list(grid.flat)[rounds.slots :]:
            axes.set_visible(False)
        for slot, (axes, position) in enumerate(zip(grid.flat, record["positions"], strict=False)):
            axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            for number, (label, (key, predicted)) in enumerate(curves.items()):
                _curve(axes, rounds, predicted, slot, bins, label, number, position[key])
            axes.set_title(f"tokens 1 to {slot + 1}" if slot else "token 1", loc="left")
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
            axes.tick_params(labelbottom=True)
            if slot % columns == 0:
                axes.set_ylabel("share kept")
            if slot + columns >= rounds.slots:
                axes.set_xlabel("predicted survival")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(curves))


def _curve(
    axes: Axes,
    rounds: RecordedRounds,
    predicted: Floats,
    slot: int,
    bins: int,
    label: str,
    number: int,
    measured: Mapping[str, Any],
) -> None:
    here = rounds.reached(slot)
    points = reliability_bins(predicted[here, slot], rounds.survived(slot)[here], bins)
    x, y, count = ([point[key] for point in points] for key in ("predicted", "observed", "count"))
    axes.plot(x, y, color=PALETTE[number], label=label)
    axes.scatter(x, y, [8 + 40 * n / max(count) for n in count], color=PALETTE[number])
    text = f"ECE {100 * measured['ece']:.1f}%"
    axes.text(0.04, 0.96 - 0.09 * number, text, color=PALETTE[number], transform=axes.transAxes, va="top", fontsize=9)


def print_calibration(record: Mapping[str, Any], console: Console) -> None:
    table = Table("k", "T", "rounds", "kept", title="Survival of drafted tokens 1 to k")
    table.caption = "Held out: calibrated on other prompts."
    for column in ("ECE before", "after", "held out", "AUC before", "after", "held out"):
        table.add_column(column, justify="right")
    names = ("before", "after", "held_out")
    for position in record["positions"]:
        table.add_row(
            str(position["k"]),
            f"{position['temperature']:.2f}",
            str(position["rounds"]),
            f"{position['observed']:.3f}",
            *(f"{position[name]['ece']:.2%}" for name in names),
            *("-" if position[name]["auc"] is None else f"{position[name]['auc']:.3f}" for name in names),
        )
    console.print(table)
    mean = record["mean_ece"]
    console.print(
        f"Mean ECE {mean['before']:.2%} before, {mean['after']:.2%} after, {mean['held_out']:.2%} on other prompts "
        f"({record['rounds']} rounds of {record['prompts']} prompts)."
    )


def main(options: CalibrateOptions) -> None:
    console = Console()
    print_calibration(run(options), console)
    console.print(f"written to {options.output_dir or find_draft_folder(options.checkpoint)}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main, CalibrateOptions)
