"""SPS tables: how many passes per second the target makes, by the number of tokens in a pass (DSpark section 4).

A table is a JSON file. `python -m deepspec.decoding.profile` measures one; one computed for an H200-like GPU is part of
the package (`deepspec.decoding.roofline`). A scheduler needs `points` alone, so a table is easily written by hand.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from deepspec.config import near_match
from deepspec.data.jsonl import DataError
from deepspec.environment import machine

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
SPS_FILE = "sps.json"  # beside a draft that was measured
SHIPPED = Path(__file__).with_name("sps_tables")
SAME_MACHINE = ("cpu", "torch_threads", "accelerator")  # what a table of this machine agrees in


@dataclass(frozen=True)
class SpsTable:
    """Passes per second by tokens in a pass, and what a round costs besides, by rows.

    Between two sizes the time of a pass is linear in its tokens. Below the smallest size it is that of the smallest;
    beyond the largest it goes on with the slope of the last two (with a single one: proportional to its tokens).
    """

    tokens: Sequence[int]  # B, rising
    steps_per_second: Sequence[float]  # SPS(B)
    rows: Sequence[int] = ()  # rising; empty = a round costs nothing besides its pass
    draft_seconds: Sequence[float] = ()  # drafting for so many rows
    context_seconds: Sequence[float] = ()  # reading what so many rows have in the cache; empty = the pass includes it

    def __post_init__(self) -> None:
        _check_curve("tokens", self.tokens, "steps_per_second", self.steps_per_second)
        if not self.tokens:
            raise ValueError("an SPS table needs at least one point")
        if not all(value > 0 for value in self.steps_per_second):
            raise ValueError("steps_per_second must be above 0")
        _check_curve("rows", self.rows, "draft_seconds", self.draft_seconds)
        if self.context_seconds:
            _check_curve("rows", self.rows, "context_seconds", self.context_seconds)

    def pass_seconds(self, tokens: ArrayLike) -> Floats:
        """Seconds of a pass of so many tokens: [...] -> [...]."""
        return _piecewise_linear(tokens, self.tokens, 1 / np.asarray(self.steps_per_second, dtype=np.float64))

    def beside_seconds(self, rows: ArrayLike, *, drafting: bool = True) -> Floats:
        """Seconds of a round of so many rows besides its pass: [...] -> [...]. Plain decoding does not draft."""
        seconds = np.zeros(np.shape(rows))
        for curve in (self.context_seconds, self.draft_seconds if drafting else ()):
            if curve:
                seconds = seconds + _piecewise_linear(rows, self.rows, np.asarray(curve, dtype=np.float64))
        return seconds

    def round_seconds(self, tokens: ArrayLike, rows: ArrayLike, *, drafting: bool = True) -> Floats:
        """Seconds of a whole round."""
        return self.pass_seconds(tokens) + self.beside_seconds(rows, drafting=drafting)


def _check_curve(x_name: str, xs: Sequence[int], y_name: str, ys: Sequence[float]) -> None:
    if len(xs) != len(ys):
        raise ValueError(f"{len(xs)} {x_name}, but {len(ys)} {y_name}")
    if not all(isinstance(x, int) and x >= 1 for x in xs) or list(xs) != sorted(set(xs)):
        raise ValueError(f"{x_name} must be rising whole numbers from 1 on, not {list(xs)}")
    if not all(np.isfinite(y) and y >= 0 for y in ys):
        raise ValueError(f"{y_name} must be finite and not negative, not {list(ys)}")


def _piecewise_linear(x: ArrayLike, xs: Sequence[int], ys: Floats) -> Floats:
    positions = np.asarray(x, dtype=np.float64)
    inside = np.interp(positions, xs, ys)
    slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else ys[-1] / xs[-1]
    return inside + max(slope, 0.0) * np.clip(positions - xs[-1], 0, None)


def smooth(seconds: ArrayLike) -> Floats:
    """The nearest times that never fall with the size of the pass (isotonic regression), by relative error."""
    measured = np.asarray(seconds, dtype=np.float64)
    return isotonic_regression(measured, weights=measured**-2.0).x


def smoothing_report(measured: ArrayLike, smoothed: ArrayLike) -> dict[str, Any]:
    """By how much smoothing changed the measured values, relatively."""
    before, after = np.asarray(measured, dtype=np.float64), np.asarray(smoothed, dtype=np.float64)
    change = np.abs(after / before - 1)
    return {
        "method": "isotonic",
        "largest_change": float(change.max()),
        "mean_change": float(change.mean()),
        "changed_points": int((change > 1e-12).sum()),
        "points": len(before),
    }


def load_table(path: str | Path, *, of_this_machine: bool = True) -> SpsTable:
    """Read a table from a JSON file, or one that the package ships by its name.

    Args:
        of_this_machine: warn if it was made on another one. False for planning.

    Raises:
        FileNotFoundError: no such file or name.
        DataError: not an SPS table; the message says why.
    """
    file = _table_file(path)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        points, beside = record["points"], record.get("rows", [])
        table = SpsTable(
            [point["tokens"] for point in points],
            [point["steps_per_second"] for point in points],
            [point["rows"] for point in beside],
            [point["draft_seconds"] for point in beside],
            [point["context_seconds"] for point in beside if "context_seconds" in point],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not an SPS table ({type(error).__name__}: {error}); expected "
            '{"points": [{"tokens": 1, "steps_per_second": 100.0}, ...]}'
        ) from error
    if of_this_machine and (differences := machine_differences(record.get("machine") or {})):
        logger.warning(
            "%s is not an SPS table of this machine (%s): the scheduler stays exact but may verify too many or too few "
            "tokens; measure with python -m deepspec.decoding.profile",
            file,
            "; ".join(differences),
        )
    return table


def machine_differences(recorded: Mapping[str, Any]) -> list[str]:
    """In what a table's machine differs from this one; empty when it is this one."""
    here = machine()
    return [f"{key} {recorded.get(key)}, here {here[key]}" for key in SAME_MACHINE if recorded.get(key) != here[key]]


def _table_file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = {table.stem: table for table in sorted(SHIPPED.glob("*.json"))}
    if str(path) in shipped:
        return shipped[str(path)]
    raise FileNotFoundError(
        f"{path}: no such SPS table; make one with python -m deepspec.decoding.profile, or name a shipped one: "
        f"{', '.join(shipped)}.{near_match(str(path), shipped)}"
    )
