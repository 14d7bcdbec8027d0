"""How far predicted probabilities can be believed: reliability bins, expected calibration error, ranking."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]


def reliability_bins(predicted: Floats, observed: Floats, bins: int) -> list[dict[str, Any]]:
    """Means of both over the items whose prediction falls into each of `bins` equal parts of [0, 1].

    Args:
        predicted: probabilities, [items].
        observed: 0 or 1, [items].

    Returns:
        `low`, `high`, `count`, `predicted` and `observed` of the bins that are not empty.
    """
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        chosen = place == b
        if chosen.any():
            means = {"predicted": float(predicted[chosen].mean()), "observed": float(observed[chosen].mean())}
            rows.append({"low": b / bins, "high": (b + 1) / bins, "count": int(chosen.sum()), **means})
    return rows


def calibration_error(predicted: Floats, observed: Floats, bins: int) -> float:
    """ECE: sum_b n_b / n |observed_b - predicted_b| over equal parts of [0, 1]; arguments as of `reliability_bins`."""
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(place, observed - predicted, minlength=bins)).sum() / len(predicted))


def trust(predicted: Floats, observed: Floats, bins: int) -> dict[str, float | None]:
    """`ece`, and `auc`, the area under the ROC curve, which is None when all items had the same outcome."""
    auc = float(roc_auc_score(observed, predicted)) if 0 < observed.sum() < len(observed) else None
    return {"ece": calibration_error(predicted, observed, bins), "auc": auc}
