"""A report about one or several drafts: numbers, pictures, sample texts, how to make it again.

    python -m deepspec.evaluation.report OUT_DIR --train NAME=RUN_DIR ... --eval NAME=EVAL_DIR ...

NAME is how the report calls a draft; RUN_DIR is an output_dir of train.py, EVAL_DIR one of eval.py. Writes report.md,
metrics.json (the evaluations by name) and PNGs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from deepspec.config import ConfigError
from deepspec.data.jsonl import DataError
from deepspec.evaluation.plots import plot_acceptance, plot_reliability, plot_tau, plot_training
from deepspec.evaluation.report_inputs import ReportInputs, read_inputs
from deepspec.evaluation.report_text import report_text
from deepspec.files import write_atomically


def write_report(out_dir: str | Path, inputs: ReportInputs, command: str) -> Path:
    """Write everything into `out_dir`. Returns the path of report.md."""
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = inputs.evaluations
    pictures = {"tau.png": "Accepted length by set, with 95% intervals"}
    plot_tau(evaluations, folder / "tau.png")
    pictures["acceptance.png"] = "Acceptance by position in the block"
    plot_acceptance(evaluations, folder / "acceptance.png")
    if inputs.runs:
        pictures["training.png"] = "Losses and expected accepted length during training"
        plot_training(inputs.runs, folder / "training.png")
    if plot_reliability(evaluations, folder / "reliability.png"):
        pictures["reliability.png"] = "Observed acceptance against the confidence head's"
    write_atomically(folder / "metrics.json", json.dumps({"evaluations": evaluations}, indent=2) + "\n")
    write_atomically(folder / "report.md", report_text(inputs, pictures, command))
    return folder / "report.md"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deepspec.evaluation.report", description="Report about drafts: numbers, plots, sample texts."
    )
    parser.add_argument("out_dir", help="folder to write report.md, metrics.json and PNGs to")
    parser.add_argument("--eval", action="append", default=[], metavar="NAME=DIR", help="output_dir of eval.py")
    parser.add_argument("--train", action="append", default=[], metavar="NAME=DIR", help="output_dir of train.py")
    return parser.parse_args(words)


def named_folders(words: Sequence[str], option: str) -> dict[str, Path]:
    """`NAME=DIR` words.

    Raises:
        ConfigError: not of this form, or a name that was given twice.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not name or not folder:
            raise ConfigError(f"{option} {word}: expected NAME=DIR, for example {option} DSpark=outputs/smoke")
        if name in folders:
            raise ConfigError(f"{option} {word}: the name {name} was given before")
        folders[name] = Path(folder)
    return folders


def main(words: Sequence[str] | None = None) -> int:
    options = parse_arguments(words)
    arguments = sys.argv[1:] if words is None else list(words)
    try:
        inputs = read_inputs(named_folders(options.eval, "--eval"), named_folders(options.train, "--train"))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write_report(options.out_dir, inputs, f"python -m deepspec.evaluation.report {shlex.join(arguments)}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
