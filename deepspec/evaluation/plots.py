"""Pictures of a report: accepted length, acceptance by position, training, confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepspec.plotting import MARKERS, MUTED, PALETTE, figure_of

LOSSES = {
    "loss": "Total loss (weighted sum)",
    "ce": "Cross-entropy (nats)",
    "tv": "L1 distance between draft and target (0 to 2)",
}
EXPECTED_TAU = "tau"
FEW_ROUNDS = 30

Evaluations = Mapping[str, Mapping[str, Any]]  # draft name -> metrics.json


def _legend(figure: Figure, axes: Axes, columns: int, note: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=note)
    legend.get_title().set(fontsize=9, color=MUTED)


def temperatures_of(evaluations: Evaluations) -> list[float]:
    """All that occur, in the order of the first evaluation that has them."""
    return list(dict.fromkeys(result["temperature"] for m in evaluations.values() for result in m["results"]))


def sets_of(evaluations: Evaluations) -> list[str]:
    return list(dict.fromkeys(name for m in evaluations.values() for result in m["results"] for name in result["sets"]))


def result_at(metrics: Mapping[str, Any], temperature: float) -> Mapping[str, Any] | None:
    return next((result for result in metrics["results"] if result["temperature"] == temperature), None)


def set_at(metrics: Mapping[str, Any], temperature: float, name: str) -> Mapping[str, Any] | None:
    result = result_at(metrics, temperature)
    return None if result is None else result["sets"].get(name)


def plot_tau(evaluations: Evaluations, path: Path) -> None:
    """tau of every draft by set, a panel per temperature, with 95% intervals."""
    temperatures, sets = temperatures_of(evaluations), sets_of(evaluations)
    groups = [*sets, "mean of sets"] if len(sets) > 1 else sets
    width = max(7.0, 1.2 + len(groups) * (0.55 + 0.42 * len(evaluations)))
    with figure_of(path, width, 0.9 + 3.2 * len(temperatures), "Accepted length") as figure:
        panels = figure.subplots(len(temperatures), 1, squeeze=False)[:, 0]
        for axes, temperature in zip(panels, temperatures, strict=True):
            for number, (name, metrics) in enumerate(evaluations.items()):
                _tau_bars(axes, metrics, temperature, groups, name, number, len(evaluations))
            _tau_limits(axes, sorted({metrics["draft"]["block_size"] for metrics in evaluations.values()}))
            axes.set_xticks(range(len(groups)), groups)
            axes.set_title(f"Temperature {temperature:g}", loc="left")
            axes.set_ylabel("tokens per round")
            axes.grid(visible=False, axis="x")
        _legend(figure, panels[0], len(evaluations))


def _tau_bars(
    axes: Axes, metrics: Mapping[str, Any], temperature: float, groups: Sequence[str], name: str, number: int, of: int
) -> None:
    result = result_at(metrics, temperature)
    thickness = 0.78 / of
    label: str | None = name
    for place, group in enumerate(groups):
        measured = None if result is None else result["sets"].get(group, result["macro"] if place else None)
        tau = measured["tau"] if measured else None
        if tau is None or tau["value"] is None:
            continue
        x = place + (number - (of - 1) / 2) * thickness
        axes.bar(x, tau["value"], 0.92 * thickness, color=PALETTE[number % len(PALETTE)], label=label)
        label = None
        top = tau["value"] if tau["high"] is None else tau["high"]
        if tau["high"] is not None:
            axes.vlines(x, tau["low"], tau["high"], color="black", linewidth=1.2)
        axes.annotate(
            f"{tau['value']:.2f}", (x, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
        )


def _tau_limits(axes: Axes, block_sizes: Sequence[int]) -> None:
    """Lines at plain decoding and at the most that a round can give."""
    lines = {1.0: "plain\ndecoding"} | {float(g + 1): f"all {g}\naccepted" for g in block_sizes}
    for height, text in lines.items():
        axes.axhline(height, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=3 if height == 1 else 1)
        axes.annotate(
            text,
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=MUTED,
        )
    axes.set_ylim(0, (max(block_sizes) + 1) * 1.12)


def plot_acceptance(evaluations: Evaluations, path: Path) -> None:
    """`cond_accept@k` by position, a panel per set and temperature."""
    temperatures, sets = temperatures_of(evaluations), sets_of(evaluations)
    columns = min(3, len(sets))
    rows_each = -(-len(sets) // columns)
    rows = rows_each * len(temperatures)
    title = "Acceptance by position, given that all earlier tokens were accepted"
    with figure_of(path, max(7.5, 1 + 3.3 * columns), 1.1 + 2.7 * rows, title) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat:
            axes.set_visible(False)
        for block, temperature in enumerate(temperatures):
            for place, name in enumerate(sets):
                axes = grid[block * rows_each + place // columns, place % columns]
                axes.set_visible(True)
                axes.set_title(f"{name}, temperature {temperature:g}", loc="left")
                axes.tick_params(labelbottom=True, labelleft=True)
                for number, (draft, metrics) in enumerate(evaluations.items()):
                    measured = set_at(metrics, temperature, name)
                    if measured:
                        _acceptance_line(axes, measured, draft, number, len(evaluations))
                axes.set_ylim(0, 1.03)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_xlabel("position k in the block")
                if place % columns == 0:
                    axes.set_ylabel("cond_accept@k")
        note = f"Bars: 95% intervals over prompts. Pale: fewer than {FEW_ROUNDS} rounds came that far."
        _legend(figure, grid[0, 0], len(evaluations), note)


def _acceptance_line(axes: Axes, measured: Mapping[str, Any], draft: str, number: int, of: int) -> None:
    """A line with 95% intervals; drafts stand side by side, and what few rounds reached is pale."""
    colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
    shift = (number - (of - 1) / 2) * 0.14
    known = [(k + shift, at) for k, at in enumerate(measured["cond_accept_estimates"], 1) if at["value"] is not None]
    solid = [(x, at) for x, at in known if at["rounds"] >= FEW_ROUNDS]
    axes.plot([x for x, _ in known], [at["value"] for _, at in known], color=colour, alpha=0.25)
    axes.plot([x for x, _ in solid], [at["value"] for _, at in solid], color=colour, marker=marker, label=draft)
    for x, at in known:
        strength = 1.0 if at["rounds"] >= FEW_ROUNDS else 0.3
        axes.plot([x], [at["value"]], color=colour, marker=marker, alpha=strength, clip_on=False)
        if at["low"] is not None:
            axes.vlines(x, at["low"], at["high"], color=colour, linewidth=1.2, alpha=strength)


def plot_training(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Losses and expected tau over optimizer steps, of training batches and of held-out data.

    Args:
        runs: draft name -> rows of its metrics.jsonl.
    """
    with figure_of(path, 10, 7.2, "Training") as figure:
        grid = figure.subplots(2, 2, squeeze=False)
        panels = {**LOSSES, EXPECTED_TAU: "Expected accepted length (tokens per round)"}
        for axes, (key, title) in zip(grid.flat, panels.items(), strict=True):
            for number, (draft, rows) in enumerate(runs.items()):
                colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
                steps, values = _column(rows, key)
                axes.plot(steps, values, color=colour, alpha=0.75, linewidth=1.3, label=f"{draft}, training")
                steps, values = _column(rows, f"eval/{key}")
                style = {"linestyle": "--", "marker": marker, "markersize": 6, "markeredgecolor": "white"}
                axes.plot(steps, values, color=colour, label=f"{draft}, held out", **style)
            axes.set_title(title, loc="left")
            axes.set_xlabel("optimizer step")
            axes.set_ylim(bottom=1 if key == EXPECTED_TAU else 0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _legend(figure, grid[0, 0], 2 * len(runs) if len(runs) < 3 else len(runs))


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in known], [value for _, value in known]


def confident(evaluations: Evaluations) -> list[tuple[str, float, Mapping[str, Any]]]:
    """(draft, temperature, reliability) wherever a draft gave confidences."""
    return [
        (name, result["temperature"], result["reliability"])
        for name, metrics in evaluations.items()
        for result in metrics["results"]
        if result["reliability"]
    ]


def plot_reliability(evaluations: Evaluations, path: Path) -> bool:
    """Observed acceptance against the confidence head's, a panel per draft and temperature, all sets pooled.

    Returns:
        False, and draws nothing, when no draft has a confidence head.
    """
    shown = confident(evaluations)
    if not shown:
        return False
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    title = "Confidence and what was accepted"
    with figure_of(path, max(5.4, 0.8 + 4.0 * columns), 0.6 + 4.6 * rows, title) as figure:
        grid = figure.subplots(2 * rows, columns, squeeze=False, sharex=True, height_ratios=[3.2, 1] * rows)
        for axes in grid.flat:
            axes.set_visible(False)
        for place, (draft, temperature, measured) in enumerate(shown):
            row, column = place // columns, place % columns
            colour = PALETTE[list(evaluations).index(draft) % len(PALETTE)]
            upper, lower = grid[2 * row, column], grid[2 * row + 1, column]
            _reliability_panel(upper, measured, colour)
            upper.set_title(f"{draft}, temperature {temperature:g}", loc="left")
            bins = measured["bins"]
            width = bins[0]["high"] - bins[0]["low"]
            lower.set_visible(True)
            lower.bar(
                [row["low"] for row in bins],
                [100 * row["count"] / measured["slots"] for row in bins],
                0.94 * width,
                align="edge",
                color=colour,
                alpha=0.6,
            )
            lower.set_xlabel("confidence")
            lower.set_ylabel("% of tokens")
            lower.tick_params(labelbottom=True)
    return True


def _reliability_panel(axes: Axes, measured: Mapping[str, Any], colour: str) -> None:
    axes.set_visible(True)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="perfect")
    predicted, observed = ([row[key] for row in measured["bins"]] for key in ("predicted", "observed"))
    axes.plot(predicted, observed, color=colour, marker="o", markersize=6, label="measured")
    auc = "not defined" if measured["auc"] is None else f"{measured['auc']:.3f}"
    text = f"calibration error (ECE) {100 * measured['ece']:.1f}%\nranking (AUC) {auc}\n{measured['slots']:,} tokens"
    axes.text(0.03, 0.97, text, transform=axes.transAxes, va="top", fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_ylabel("share accepted")
    axes.tick_params(labelbottom=False)
    axes.legend(loc="lower right", fontsize=9)
