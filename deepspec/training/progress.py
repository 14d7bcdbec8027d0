"""What rank 0 shows while it trains: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepspec.training.meter import PARTS


class ProgressReport(Protocol):
    """Told of every step; `metrics` are empty except where the step is logged."""

    def __enter__(self) -> ProgressReport: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def step(self, done: int, loss: float | None, metrics: Mapping[str, float]) -> None: ...
    def say(self, text: str) -> None: ...


def progress_report(steps: int, start: int, *, is_main: bool) -> ProgressReport:
    """The report that fits this rank and its standard output."""
    if not is_main:
        return Silence()
    console = Console(file=sys.stdout)
    return Bar(console, steps, start) if console.is_terminal else Lines(steps, start)


class Silence:
    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, done: int, loss: float | None, metrics: Mapping[str, float]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class Lines(Silence):
    """One line per logged step."""

    def __init__(self, steps: int, start: int):
        self.steps = steps
        self.start = start
        self.began = time.monotonic()

    def step(self, done: int, loss: float | None, metrics: Mapping[str, float]) -> None:
        if "lr" in metrics:
            per_step = (time.monotonic() - self.began) / max(1, done - self.start)
            left = timedelta(seconds=round(per_step * (self.steps - done)))
            figures = "  ".join([_figures(loss, metrics), *_cost(metrics)])
            self.say(f"step {done}/{self.steps}  {figures}  lr {metrics['lr']:.2e}  eta {left}")
        if "eval/loss" in metrics:
            self.say(f"step {done}/{self.steps}  {_evaluation(metrics)}")

    def say(self, text: str) -> None:
        print(text, flush=True)


class Bar(Silence):
    """A live bar; its figures are those of the newest logged step, the loss that of every step."""

    def __init__(self, console: Console, steps: int, start: int):
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("train", total=steps, completed=start, figures="")
        self.metrics: Mapping[str, float] = {}

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, done: int, loss: float | None, metrics: Mapping[str, float]) -> None:
        if "lr" in metrics:
            self.metrics = metrics
        if "eval/loss" in metrics:
            self.say(f"step {done}: {_evaluation(metrics)}")
        self.progress.update(self.task, completed=done, figures=_figures(loss, self.metrics))

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)


def _evaluation(metrics: Mapping[str, float]) -> str:
    tau = f"  tau {metrics['eval/tau']:.2f}" if "eval/tau" in metrics else ""
    return f"held out: loss {metrics['eval/loss']:.4f}{tau}"


def _figures(loss: float | None, metrics: Mapping[str, float]) -> str:
    """Loss, expected accepted length and speed, as far as they are known."""
    parts = ["no anchor" if loss is None else f"loss {loss:.4f}"]
    if "tau" in metrics:
        parts.append(f"tau {metrics['tau']:.2f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def _cost(metrics: Mapping[str, float]) -> list[str]:
    """Where the time of a step goes, memory and utilisation, as far as they are known."""
    seconds = metrics.get("step_seconds")
    if not seconds:
        return []
    shares = [f"{name} {metrics[f'{name}_seconds'] / seconds:.0%}" for name in PARTS]
    parts = [f"{metrics['anchors_per_second']:,.0f} anchors/s", f"{seconds:.3g} s/step ({', '.join(shares)})"]
    parts.append(f"{metrics['peak_memory_gib']:.2f} GiB")
    if "model_flops_utilization" in metrics:
        parts.append(f"MFU {metrics['model_flops_utilization']:.1%}")
    return parts
