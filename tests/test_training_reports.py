"""metrics.jsonl and what the terminal shows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from deepspec.checkpoints import CheckpointError
from deepspec.training.log import MetricsLog, read_metrics
from deepspec.training.progress import Bar, Lines, Silence, progress_report

LOGGED = {"lr": 3e-4, "tau": 2.5, "tokens_per_second": 1234.5, "loss": 1.5}


def test_rows_are_appended(tmp_path):
    MetricsLog(tmp_path, 0).write(1, {"loss": 2.0})
    MetricsLog(tmp_path, 1).write(2, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": 1 / step})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    MetricsLog(tmp_path, 2).write(3, {"loss": 9.0})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert log.path.read_text().count("\n") == 3


def test_new_run_starts_an_empty_file(tmp_path):
    MetricsLog(tmp_path, 0).write(7, {"loss": 1.0})
    MetricsLog(tmp_path, 0)
    assert read_metrics(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_on_a_full_disk(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.path.symlink_to("/dev/full")
    with pytest.raises(CheckpointError) as error:
        log.write(3, {"loss": 1.0})
    message = f"could not write the metrics of step 3 to {log.path}: [Errno 28] No space left on device. "
    assert str(error.value).startswith(message + "Earlier checkpoints are untouched: free some space")


def test_plain_lines(capsys):
    with progress_report(10, 0, is_main=True) as progress:  # pytest's output is no terminal
        assert isinstance(progress, Lines)
        progress.step(1, 1.5, {})
        progress.step(2, 1.25, LOGGED)
        progress.step(3, 1.0, {"eval/loss": 0.5, "eval/tau": 3.25})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 2/10  loss 1.2500  tau 2.50  1,234 tokens/s  lr 3.00e-04  eta 0:00:0")
    assert lines[1] == "step 3/10  held out: loss 0.5000  tau 3.25"


def test_bar_in_a_terminal():
    screen = io.StringIO()
    with Bar(Console(file=screen, force_terminal=True, width=120), steps=10, start=4) as bar:
        bar.step(5, 1.25, LOGGED)
        bar.step(6, 1.0, {"eval/loss": 0.5, "eval/tau": 3.25})
    shown = screen.getvalue()
    for expected in ("6/10", "loss 1.0000", "tau 2.50", "1,234 tokens/s", "eta", "held out: loss 0.5000  tau 3.25"):
        assert expected in shown


def test_other_ranks_are_silent(capsys):
    with progress_report(10, 0, is_main=False) as progress:
        assert isinstance(progress, Silence)
        progress.step(1, 1.5, LOGGED)
        progress.say("hello")
    assert capsys.readouterr().out == ""
