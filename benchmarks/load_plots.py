"""Pictures of a load sweep, as figures 7 and 8 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from benchmarks.load_results import CLOSED, PLAIN
from deepspec.plotting import MARKERS, PALETTE, figure_of

Figures = Mapping[str, Any]
Results = Sequence[Mapping[str, Any]]
Point = Callable[[Figures, Figures], tuple[float, float]]  # of a load and what a policy reached there


def plot_throughput(results: Results, path: Path, title: str) -> None:
    """Output tokens/s against tokens/s per user, a line per policy, a point per load."""

    def point(_: Figures, of_policy: Figures) -> tuple[float, float]:
        return of_policy["tokens_per_second_per_user"], of_policy["tokens_per_second"]["median"]

    with figure_of(path, *_size(results), f"Throughput and interactivity: {title}") as figure:
        for axes in _panels(figure, results, point):
            axes.set(xscale="log", yscale="log", xlabel="tokens/s per user", ylabel="output tokens/s")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
                axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
                axis.set_minor_locator(NullLocator())


def plot_budget(results: Results, path: Path, title: str) -> None:
    """Drafted tokens verified per request and round, against how many requests are served together."""

    def point(result: Figures, of_policy: Figures) -> tuple[float, float]:
        concurrency = result["load"] if result["arrivals"] == CLOSED else of_policy["concurrency"]
        return concurrency, of_policy["verified_per_round"]

    with figure_of(path, *_size(results), f"Verification budget: {title}") as figure:
        for axes in _panels(figure, results, point, without=PLAIN):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="requests served together", ylabel="verified tokens per request and round", ylim=(0, None))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _kinds(results: Results) -> list[str]:
    return list(dict.fromkeys(result["arrivals"] for result in results))


def _size(results: Results) -> tuple[float, float]:
    return 1.6 + 5.2 * len(_kinds(results)), 5.2


def _panels(figure: Figure, results: Results, point: Point, without: str | None = None) -> Iterator[Axes]:
    """A panel per kind of arrivals, a line per policy, a point per load; the legend below."""
    panels = figure.subplots(1, len(_kinds(results)), squeeze=False)[0]
    for axes, kind in zip(panels, _kinds(results), strict=True):
        of_kind = [result for result in results if result["arrivals"] == kind]
        for number, name in enumerate(of_kind[0]["policies"]):
            if name != without:
                x, y = zip(*(point(result, result["policies"][name]) for result in of_kind), strict=True)
                axes.plot(x, y, color=PALETTE[number], marker=MARKERS[number], markersize=5, label=name)
        axes.set_title("Closed loop" if kind == CLOSED else "Poisson arrivals", loc="left")
        yield axes
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
