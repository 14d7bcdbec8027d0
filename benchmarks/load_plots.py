"""Pictures of a load sweep, as figures 7 and 8 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

from benchmarks.load_results import CLOSED, PLAIN
from deepspec.plotting import MARKERS, PALETTE, figure_of

Figures = Mapping[str, Any]
Results = Sequence[Mapping[str, Any]]


def plot_throughput(results: Results, path: Path, title: str) -> None:
    """Output tokens/s against tokens/s per user, a line per policy, a point per load."""
    with figure_of(path, *_size(results), f"Throughput and interactivity: {title}") as figure:
        panels = figure.subplots(1, len(_kinds(results)), squeeze=False)[0]
        for axes, kind in zip(panels, _kinds(results), strict=True):
            _lines(
                axes,
                results,
                kind,
                lambda of: (of["tokens_per_second_per_user"], of["tokens_per_second"]["median"]),
            )
            axes.set(xscale="log", yscale="log", xlabel="tokens/s per user", ylabel="output tokens/s")
            _plain_numbers(axes.xaxis, axes.yaxis)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def plot_budget(results: Results, path: Path, title: str) -> None:
    """Drafted tokens verified per request and round, against how many requests are served together."""
    with figure_of(path, *_size(results), f"Verification budget: {title}") as figure:
        panels = figure.subplots(1, len(_kinds(results)), squeeze=False)[0]
        for axes, kind in zip(panels, _kinds(results), strict=True):
            _lines(axes, results, kind, lambda of: (of["concurrency"], of["verified_per_round"]), without=PLAIN)
            axes.set_xscale("log", base=2)
            axes.set(xlabel="requests inside", ylabel="verified tokens per request and round", ylim=(0, None))
            _plain_numbers(axes.xaxis)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _kinds(results: Results) -> list[str]:
    return list(dict.fromkeys(result["arrivals"] for result in results))


def _size(results: Results) -> tuple[float, float]:
    return 0.8 + 5.6 * len(_kinds(results)), 5.2


def _lines(
    axes: Axes,
    results: Results,
    kind: str,
    point: Callable[[Figures], tuple[float, float]],
    without: str | None = None,
) -> None:
    of_kind = [result for result in results if result["arrivals"] == kind]
    for number, name in enumerate(of_kind[0]["policies"]):
        if name != without:
            x, y = zip(*(point(result["policies"][name]) for result in of_kind), strict=True)
            axes.plot(x, y, color=PALETTE[number], marker=MARKERS[number], markersize=5, linewidth=1.4, label=name)
    axes.set_title("Closed loop" if kind == CLOSED else "Poisson arrivals", loc="left")


def _plain_numbers(*sides: Any) -> None:
    for side in sides:
        side.set_major_formatter(ScalarFormatter())
