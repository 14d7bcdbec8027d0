"""Sequential temperature scaling: make the confidence head's survival probabilities true (DSpark section 4).

A head that ranks tokens well can still be over-confident, and a scheduler that weighs survival against time needs the
numbers themselves. For k = 1..block_size in order, T_k is the temperature that minimises the expected calibration error
of the survival prod_{i <= k} sigmoid(logit_i / T_i), with the earlier ones fixed; a search along one line each. Where
few tokens survive, the error hardly depends on T_k; there it stays as near to 1 as it can without a noticeable loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from deepspec.data.jsonl import DataError
from deepspec.decoding.reliability import Floats, calibration_error, trust

CALIBRATION_FILE = "calibration.json"
TEMPERATURES = np.geomspace(0.1, 10, 201)  # searched; 2.3% apart
TEMPERATURES[100] = 1.0
NOTICEABLE = 5e-4  # of a calibration error: 0.05 percentage points


@dataclass(frozen=True)
class RecordedRounds:
    """Rounds of whole blocks. Where a policy chose the length by the confidences, what it cut off is missing and what
    is there is a biased sample, so such rounds cannot calibrate."""

    confidences: Floats  # [rounds, slots], as the head gave them; NaN where a round ended before
    proposed: NDArray[np.int64]  # [rounds]
    accepted: NDArray[np.int64]  # [rounds]
    prompts: NDArray[np.int64]  # [rounds], which prompt a round belongs to

    def chosen(self, mask: NDArray[np.bool_]) -> RecordedRounds:
        return RecordedRounds(self.confidences[mask], self.proposed[mask], self.accepted[mask], self.prompts[mask])

    @property
    def slots(self) -> int:
        return self.confidences.shape[1]

    def reached(self, slot: int) -> NDArray[np.bool_]:
        return self.proposed > slot

    def survived(self, slot: int) -> Floats:
        """Whether the tokens up to this slot were all kept: 0 or 1, [rounds]."""
        return (self.accepted > slot).astype(np.float64)


def predicted_survival(confidences: Floats, temperatures: Sequence[float]) -> Floats:
    """prod_{i <= k} sigmoid(logit(c_i) / T_i): [rounds, slots] -> same shape; NaN stays NaN."""
    return np.cumprod(expit(logit(confidences) / np.asarray(temperatures)), axis=1)


def fit_temperatures(rounds: RecordedRounds, bins: int = 10) -> list[float]:
    """T_k for every slot: nearest to 1 among those whose error is the least or not noticeably more.

    Raises:
        DataError: no round proposed so many tokens.
    """
    survival, temperatures = np.ones(len(rounds.confidences)), []
    nearest_first = TEMPERATURES[np.argsort(np.abs(np.log(TEMPERATURES)), kind="stable")]
    for slot in range(rounds.slots):
        here = rounds.reached(slot)
        if not here.any():
            raise DataError(f"no round proposed {slot + 1} tokens, so position {slot + 1} cannot be calibrated")
        logits, observed = logit(rounds.confidences[here, slot]), rounds.survived(slot)[here]
        errors = [
            calibration_error(survival[here] * expit(logits / temperature), observed, bins)
            for temperature in nearest_first
        ]
        best = float(nearest_first[int(np.argmax(errors <= np.min(errors) + NOTICEABLE))])
        survival[here] *= expit(logits / best)
        temperatures.append(best)
    return temperatures


def held_out_survival(rounds: RecordedRounds, bins: int = 10) -> Floats:
    """Survival predicted with temperatures fitted to other prompts, two halves crosswise: [rounds, slots].

    Raises:
        DataError: half of the prompts is not enough to fit anything.
    """
    odd = rounds.prompts % 2 == 1
    predicted = np.full_like(rounds.confidences, np.nan)
    for half in (odd, ~odd):
        temperatures = fit_temperatures(rounds.chosen(~half), bins)
        predicted[half] = predicted_survival(rounds.confidences[half], temperatures)
    return predicted


def survival_trust(rounds: RecordedRounds, predicted: Floats, bins: int = 10) -> list[dict[str, Any]]:
    """For every slot: mean `predicted` survival, `ece` and `auc` against what was kept."""
    positions = []
    for slot in range(rounds.slots):
        here = rounds.reached(slot)
        values, observed = predicted[here, slot], rounds.survived(slot)[here]
        positions.append({"predicted": float(values.mean()), **trust(values, observed, bins)})
    return positions


@dataclass(frozen=True)
class Calibration:
    """Temperatures and what they changed. `held_out` is `after` for temperatures that were fitted to other prompts."""

    temperatures: list[float]
    positions: list[dict[str, Any]]  # k, rounds, observed, temperature, before, after, held_out
    mean_ece: dict[str, float]  # over positions: before, after, held_out


def calibrate(rounds: RecordedRounds, bins: int = 10) -> Calibration:
    """Fit the temperatures and measure survival without them, with them, and with those of other prompts.

    Raises:
        DataError: see `fit_temperatures`.
    """
    temperatures = fit_temperatures(rounds, bins)
    measured = {
        name: survival_trust(rounds, predicted, bins)
        for name, predicted in (
            ("before", predicted_survival(rounds.confidences, [1.0] * rounds.slots)),
            ("after", predicted_survival(rounds.confidences, temperatures)),
            ("held_out", held_out_survival(rounds, bins)),
        )
    }
    positions = [
        {
            "k": slot + 1,
            "rounds": int(rounds.reached(slot).sum()),
            "observed": float(rounds.survived(slot)[rounds.reached(slot)].mean()),
            "temperature": temperatures[slot],
            **{name: values[slot] for name, values in measured.items()},
        }
        for slot in range(rounds.slots)
    ]
    mean_ece = {name: float(np.mean([value["ece"] for value in values])) for name, values in measured.items()}
    return Calibration(temperatures, positions, mean_ece)


def load_calibration(draft_folder: str | Path, block_size: int) -> list[float] | None:
    """The temperatures saved with a draft, one per slot; None where it has none.

    Raises:
        DataError: the file is damaged or of another draft.
    """
    file = Path(draft_folder) / CALIBRATION_FILE
    if not file.is_file():
        return None
    try:
        temperatures = [float(value) for value in json.loads(file.read_text(encoding="utf-8"))["temperatures"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a calibration ({type(error).__name__}: {error}); calibrate again") from error
    if len(temperatures) != block_size or not all(0 < value < float("inf") for value in temperatures):
        raise DataError(
            f"{file}: expected {block_size} temperatures above 0, found {temperatures}; calibrate this draft again "
            "with python -m deepspec.decoding.calibrate"
        )
    return temperatures
